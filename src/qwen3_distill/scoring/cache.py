"""The score cache: scores kept on disk, so that one teacher scores the same tokens only once.

It is one SQLite file in a folder; several processes may use it concurrently. A row holds the bytes
of one score and their checksum, under a hash of everything that the score depends on.

Shape letters: S scored tokens, K candidates, D hidden size.
"""

import contextlib
import hashlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qwen3_distill.errors import RunFolderError
from qwen3_distill.ports import STORED_TOKENS, TeacherScorer
from qwen3_distill.scoring.wrapper import TeacherWrapper
from qwen3_distill.types import (
    GivenCandidatesRequest,
    HiddenRequest,
    HiddenScore,
    SampledRequest,
    ScoreFailure,
    ScoreRequest,
    ScoreResult,
    ScoringJob,
    TeacherScore,
    TopKRequest,
    TopKScore,
)
from qwen3_distill.utils.files import content_of

FILE_NAME = "scores.sqlite"
HITS = "score/cache_hits"
MISSES = "score/cache_misses"
DAMAGED = "score/cache_damaged"
_FORMAT = 1
_BUSY_TIMEOUT_S = 60.0
_KEYS_PER_QUERY = 500
"""SQLite takes a limited number of parameters."""


class CachedTeacher(TeacherWrapper[TeacherScorer]):
    """A `TeacherScorer` that keeps another one's scores and asks it only for new ones.

    Args:
        inner: the teacher.
        request: what `inner` was built to score.
        folder: where the scores are kept; made if it does not exist.
    """

    def __init__(self, inner: TeacherScorer, request: ScoreRequest, folder: str | Path) -> None:
        super().__init__(inner)
        self._request = request
        self._file = Path(folder) / FILE_NAME
        self._database: sqlite3.Connection | None = None
        self._counters = {HITS: 0.0, MISSES: 0.0, DAMAGED: 0.0, STORED_TOKENS: 0.0}

    @property
    def counters(self) -> Mapping[str, float]:
        return {**super().counters, **self._counters}

    async def start(self) -> None:
        """Start the teacher and open the file.

        Raises:
            RunFolderError: the file cannot be opened or made, or the folder holds files of
                something else.
        """
        self._counters = dict.fromkeys(self._counters, 0.0)
        check_cache_folder(self._file.parent)
        with self._named_errors():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        await super().start()

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        keys = [score_key(self.teacher_id, self._request, job) for job in jobs]
        with self._named_errors():
            kept = self._read(keys)
        results: dict[int, ScoreResult] = {}
        for index, (key, job) in enumerate(zip(keys, jobs, strict=True)):
            score = self._unpacked(kept.get(key), job)
            if score is not None:
                results[index] = score
        missing = [index for index in range(len(jobs)) if index not in results]
        self._counters[HITS] += len(results)
        self._counters[STORED_TOKENS] += sum(jobs[index].token_ids.size for index in results)
        self._counters[MISSES] += len(missing)
        if missing:
            new = await self.inner.score([jobs[index] for index in missing])
            results.update(zip(missing, new, strict=True))
            with self._named_errors():
                self._write({keys[i]: s for i, s in zip(missing, new, strict=True)})
        return [results[index] for index in range(len(jobs))]

    async def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        await super().close()

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            database = sqlite3.connect(self._file, timeout=_BUSY_TIMEOUT_S)
            try:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose rows, not more
                database.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, checksum INTEGER "
                    "NOT NULL, score BLOB NOT NULL) WITHOUT ROWID"
                )
            except BaseException:
                database.close()
                raise
            self._database = database
        return self._database

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, tuple[int, bytes]]:
        found: dict[bytes, tuple[int, bytes]] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            rows = self._open().execute(
                f"SELECT key, checksum, score FROM scores WHERE key IN ({marks})", part
            )
            found |= {key: (checksum, score) for key, checksum, score in rows}
        return found

    def _write(self, results: Mapping[bytes, ScoreResult]) -> None:
        rows = [
            (key, zlib.crc32(packed), packed)
            for key, score in results.items()
            if not isinstance(score, ScoreFailure)
            for packed in [_packed(score)]
        ]
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def _unpacked(self, row: tuple[int, bytes] | None, job: ScoringJob) -> TeacherScore | None:
        """Return the score of a row; None if there is no row or its checksum is wrong."""
        if row is None:
            return None
        checksum, packed = row
        if zlib.crc32(packed) != checksum:
            self._counters[DAMAGED] += 1  # scored and written again
            return None
        return _unpacked(packed, self._request, job.num_scored, self.teacher_id)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RunFolderError(
                f"the score cache {self._file} cannot be used: {error}; free space, remove the "
                "file, choose another folder for scoring.cache, or set it to null"
            ) from error


def check_cache_folder(folder: Path) -> None:
    """Check that scores may be kept in ``folder``: a new or empty one, or one that has them.

    Raises:
        RunFolderError: it is no folder, or it holds files of something else.
    """
    file = folder / FILE_NAME
    remedy = "choose another folder for scoring.cache, or set it to null"
    try:
        names = content_of(folder)
        if file.exists() and file.stat().st_size:
            with contextlib.closing(
                sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
            ) as database:
                tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
            names = sorted(tables) if tables and "scores" not in tables else []
        elif file.exists():
            names = []
    except (sqlite3.Error, OSError) as error:
        raise RunFolderError(
            f"the score cache {file} cannot be used: {error}; remove the file, {remedy}"
        ) from error
    if names:
        raise RunFolderError(
            f"scoring.cache={folder} holds files of something else ({', '.join(names[:4])}), "
            f"expected a new or empty folder, or a score cache; {remedy}"
        )


def score_key(teacher_id: str, request: ScoreRequest, job: ScoringJob) -> bytes:
    """Return the SHA-256 of everything that a score depends on: teacher, request, tokens, spans."""
    first, *others = job.scored
    if not others and first.stop == job.token_ids.size:
        places = f"{first.start}|{first.num_tokens}"
    else:
        places = "spans " + ",".join(f"{span.start}-{span.stop}" for span in job.scored)
    head = f"{_FORMAT}|{teacher_id}|{request!r}|{places}|"
    hashed = hashlib.sha256(head.encode() + job.token_ids.astype("<i4").tobytes())
    if job.candidate_ids is not None:
        hashed.update(job.candidate_ids.astype("<i4").tobytes())
    return hashed.digest()


def _packed(score: TeacherScore) -> bytes:
    parts = [score.logprobs.astype("<f4").tobytes()]
    if isinstance(score, TopKScore):
        parts += [
            score.candidate_ids.astype("<i4").tobytes(),
            score.candidate_logprobs.astype("<f4").tobytes(),
        ]
    if isinstance(score, HiddenScore):
        parts.append(score.hidden.astype("<f4").tobytes())
    return b"".join(parts)


def _unpacked(
    packed: bytes, request: ScoreRequest, num_tokens: int, teacher_id: str
) -> TeacherScore:
    head = 4 * num_tokens
    logprobs_S = np.frombuffer(packed[:head], "<f4")
    match request:
        case SampledRequest():
            return TeacherScore(teacher_id=teacher_id, logprobs=logprobs_S)
        case TopKRequest(k=k) | GivenCandidatesRequest(k=k):
            middle = head + 4 * num_tokens * k
            return TopKScore(
                teacher_id=teacher_id,
                logprobs=logprobs_S,
                candidate_ids=np.frombuffer(packed[head:middle], "<i4").reshape(-1, k),
                candidate_logprobs=np.frombuffer(packed[middle:], "<f4").reshape(-1, k),
            )
        case HiddenRequest():
            return HiddenScore(
                teacher_id=teacher_id,
                logprobs=logprobs_S,
                hidden=np.frombuffer(packed[head:], "<f4").reshape(num_tokens, -1),
            )
