"""Rollout files: round trips, older files, and files that are refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_distill.data.rollout_columns import ROLLOUT_SCHEMA, SCORED_SCHEMA
from qwen3_distill.data.rollout_files import (
    SCHEMA_VERSION,
    VERSION_KEY,
    read_rollouts,
    read_scored,
    read_training,
    write_rollouts,
    write_scored,
)
from qwen3_distill.errors import DataError
from qwen3_distill.types import (
    FinishReason,
    HiddenScore,
    Prompt,
    Rollout,
    SamplingSpec,
    ScoredRollout,
    TeacherScore,
    TokenSpan,
    TopKScore,
    TrainingRollout,
    VersionSpan,
    WeightVersion,
)

TESTS = Path(__file__).resolve().parents[2]


def decode(ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids)


def logprobs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return -np.abs(rng.standard_normal(shape)).astype(np.float32) * 10


def token_ids(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**31 - 1, shape, dtype=np.int32)


def rollout(rng: np.random.Generator, size: int, index: int = 0) -> Rollout:
    """Make ``size`` sampled tokens; every third rollout has others before, between and after."""
    cut = int(rng.integers(0, size))
    spans = [(0, cut, 3), (cut, size, 4)] if cut else [(0, size, 3)]
    sampled: tuple[TokenSpan, ...] = ()
    if index % 3 == 2:
        parts = [(1, 1 + cut), (3 + cut, 3 + size)] if cut else [(2, 2 + size)]
        sampled = tuple(TokenSpan(start=start, stop=stop) for start, stop in parts)
    return Rollout(
        rollout_id=f"7/{index}",
        prompt=Prompt(
            prompt_id=f"p:{index}",
            token_ids=token_ids(rng, 1 + size % 3),
            task_data={"answer": "π ≈ 3.14", "problem": ""} if index % 2 else {},
        ),
        sampling=SamplingSpec(
            temperature=float(rng.uniform(0.1, 2)),
            top_p=float(rng.uniform(0.1, 1)),
            top_k=int(rng.integers(0, 100)),
            max_new_tokens=size,
            seed=int(rng.integers(0, 2**63 - 1)),
        ),
        response_ids=token_ids(rng, size + 4 if sampled else size),
        sampled=sampled,
        behavior_logprobs=logprobs(rng, size),
        versions=tuple(
            VersionSpan(start=a, stop=b, version=WeightVersion(step=step, digest=f"sha:{step}"))
            for a, b, step in spans
        ),
        finish_reason=FinishReason.STOP if index % 2 else FinishReason.LENGTH,
        continues_at=index % 3,
    )


def score(rng: np.random.Generator, size: int, kind: int) -> TeacherScore:
    base = {"teacher_id": f"t{kind}", "logprobs": logprobs(rng, size)}
    if kind == 1:
        ids = token_ids(rng, size, 3)
        return TopKScore(**base, candidate_ids=ids, candidate_logprobs=logprobs(rng, size, 3))
    if kind == 2:
        return HiddenScore(**base, hidden=rng.standard_normal((size, 5)).astype(np.float32))
    return TeacherScore(**base)


def scored_rows(
    sizes: list[int], kinds: list[int], seed: int = 0
) -> list[tuple[int, ScoredRollout]]:
    rng = np.random.default_rng(seed)
    return [
        (10 + i, ScoredRollout(rollout=rollout(rng, size, i), score=score(rng, size, kind)))
        for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True))
    ]


def assert_same(one: Any, other: Any) -> None:
    """Equality field by field, of arrays bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, Mapping):
        assert list(one.items()) == list(other.items())
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def write_sample(path: Path) -> list[tuple[int, ScoredRollout]]:
    rows = scored_rows([4, 1, 3, 2], [0, 1, 2, 1])
    write_scored(path, rows, decode)
    return rows


# --- Round trip ---------------------------------------------------------------------------------


@given(
    shape=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), max_size=6),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_scored_rollouts_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: list[tuple[int, int]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "s.parquet"
    rows = scored_rows([size for size, _ in shape], [kind for _, kind in shape], seed)
    write_scored(path, rows, decode)
    assert_same(read_scored(path), rows)


def test_rollouts_come_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(5, rollout(rng, size, size)) for size in (1, 2, 300)]
    write_rollouts(tmp_path / "r.parquet", rows, decode)
    assert_same(read_rollouts(tmp_path / "r.parquet"), rows)


def test_extreme_values_come_back(tmp_path: Path) -> None:
    one = rollout(np.random.default_rng(0), 4)
    tiny = np.array([-0.0, np.finfo(np.float32).min, -np.float32(1e-45), 9e-4], dtype=np.float32)
    sampling = SamplingSpec(
        temperature=5e-324, top_p=0.1 + 0.2, top_k=2**31 - 1, max_new_tokens=1, seed=2**63 - 1
    )
    extreme = Rollout(
        rollout_id="",
        prompt=one.prompt,
        sampling=sampling,
        response_ids=one.response_ids,
        behavior_logprobs=tiny,
        versions=one.versions,
        finish_reason=one.finish_reason,
    )
    write_rollouts(tmp_path / "r.parquet", [(2**62, extreme)], decode)
    assert_same(read_rollouts(tmp_path / "r.parquet"), [(2**62, extreme)])


def test_scored_file_is_a_rollout_file(tmp_path: Path) -> None:
    rows = write_sample(tmp_path / "s.parquet")
    expected = [(step, scored.rollout) for step, scored in rows]
    assert_same(read_rollouts(tmp_path / "s.parquet"), expected)


def test_text_is_the_decoded_response_and_is_not_read_back(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = write_sample(path)
    table = pq.read_table(path)
    texts = [decode(scored.rollout.response_ids.tolist()) for _, scored in rows]
    assert table.column("response_text").to_pylist() == texts
    write_scored(path, rows, lambda ids: "something else")
    assert_same(read_scored(path), rows)


def test_columns_are_what_the_schema_says_and_pandas_reads_them(tmp_path: Path) -> None:
    rows = write_sample(tmp_path / "s.parquet")
    assert pq.read_schema(tmp_path / "s.parquet").equals(SCORED_SCHEMA)
    frame = pytest.importorskip("pandas").read_parquet(tmp_path / "s.parquet")
    assert frame["step"].tolist() == [10, 11, 12, 13]
    assert frame["score_kind"].tolist() == ["sampled", "top_k", "hidden", "top_k"]
    assert frame["candidate_ids"].isna().tolist() == [True, False, True, False]
    assert frame["hidden"].isna().tolist() == [True, True, False, True]
    np.testing.assert_array_equal(frame["response_ids"][2], rows[2][1].rollout.response_ids)
    np.testing.assert_array_equal(np.stack(frame["hidden"][2]), rows[2][1].score.hidden)  # pyright: ignore[reportAttributeAccessIssue]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    rows = write_sample(tmp_path / "s.parquet")

    def failing(ids: Sequence[int]) -> str:
        raise KeyError("no such token")

    with pytest.raises(KeyError):
        write_scored(tmp_path / "s.parquet", rows, failing)
    assert_same(read_scored(tmp_path / "s.parquet"), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


# --- Files that are not what they should be -----------------------------------------------------


def rewrite(path: Path, table: pa.Table, version: str | None = str(SCHEMA_VERSION)) -> None:
    metadata = {} if version is None else {VERSION_KEY: version.encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def with_column(table: pa.Table, name: str, values: Any, dtype: Any = None) -> pa.Table:
    column = pa.array(values, dtype or table.schema.field(name).type)
    return table.set_column(table.schema.names.index(name), name, column)


@pytest.mark.parametrize("name", SCORED_SCHEMA.names)
def test_missing_column_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    rewrite(path, pq.read_table(path).drop_columns([name]))
    with pytest.raises(DataError, match=rf"s\.parquet has no column '{name}'"):
        read_scored(path)


@pytest.mark.parametrize("name", ROLLOUT_SCHEMA.names)
def test_column_of_another_type_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    rewrite(path, with_column(pq.read_table(path), name, [True] * 4, pa.bool_()))
    with pytest.raises(DataError, match=rf"s\.parquet: column '{name}' is of type bool, expected"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rollout_id", ["a", None, "b", "c"]),
        ("response_ids", [[1, 2, 3, None], [1], [1, 2, 3], [1, 2]]),
        ("task_data", [[("answer", None)], [], [], []]),
        ("sampled", [[{"start": 0, "stop": None}]] * 4),
        ("versions", [[{"start": 0, "stop": 4, "step": 1, "digest": None}]] * 4),
        ("candidate_ids", [None, [[1, 2, None]], None, [[1, 2, 3], None]]),
    ],
)
def test_nulls_at_any_depth_are_refused(tmp_path: Path, name: str, values: Any) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    rewrite(path, with_column(pq.read_table(path), name, values))
    with pytest.raises(DataError, match=rf"s\.parquet: column '{name}' has \d nulls"):
        read_scored(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("behavior_logprobs", [[-1.0] * n for n in (4, 2, 3, 2)], "row 1 .* 1 response tokens"),
        ("response_ids", [[1, 2, 3], [1], [1] * 7, [1, 2]], r"row 0 .*within \[0, 3\)"),
        ("sampled", [[{"start": 0, "stop": 4}], [], [], []], "row 1 .*'sampled' has no span"),
        ("sampled", [[{"start": 0, "stop": 5}]] * 4, r"row 0 .*within \[0, 4\)"),
        ("sampled", [[{"start": 1, "stop": 4}]] * 4, "row 0 .*3 response tokens were sampled"),
        ("finish_reason", ["stop", "stop", "stop", "abort"], "row 3 .*'abort'"),
        ("score_kind", ["sampled", "top_k", "full", "top_k"], r"row 2 .*'full', expected \["),
        ("score_kind", ["top_k", "top_k", "hidden", "top_k"], "row 0 .*'candidate_ids' is null"),
        ("candidate_ids", [None, [[1]], None, [[1, 2], [3]]], "row 1 .*candidate_ids"),
        (
            "candidate_ids",
            [None, [[1, 2, 3]], None, [[1, 2], [3]]],
            "row 3 .*'candidate_ids' has li",
        ),
        ("temperature", [1.0, 1.0, -1.0, 1.0], "row 2 .*temperature=-1"),
    ],
)
def test_rows_that_are_no_records_are_named(
    tmp_path: Path, name: str, values: Any, message: str
) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    rewrite(path, with_column(pq.read_table(path), name, values))
    with pytest.raises(DataError, match=rf"s\.parquet, {message}"):
        read_scored(path)


def test_unscored_file_is_not_a_scored_one(tmp_path: Path) -> None:
    rows = [(1, rollout(np.random.default_rng(0), 3))]
    write_rollouts(tmp_path / "r.parquet", rows, decode)
    with pytest.raises(DataError, match="no column 'score_kind', which a file of scored rollouts"):
        read_scored(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("version", "named"), [(None, "'none'"), ("1", "'1'"), ("6", "'6'"), ("2.5", "'2.5'")]
)
def test_other_schema_versions_are_refused(tmp_path: Path, version: Any, named: str) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    rewrite(path, pq.read_table(path), version)
    message = (
        rf"s\.parquet has rollout schema version {named}, expected '2' or '3' or '4' or '5'; "
        "read it with the version of this package that wrote it"
    )
    for read in (read_rollouts, read_scored):
        with pytest.raises(DataError, match=message):
            read(path)


# --- Files of the version before ----------------------------------------------------------------


def test_a_file_of_schema_2_is_read_with_responses_that_were_sampled_as_a_whole() -> None:
    """The file was written by the code of schema 2."""
    path = TESTS / "data" / "rollouts_schema_2.parquet"
    six, seven = (WeightVersion(step=step, digest=f"digest-{step}") for step in (6, 7))

    def expected(
        number: int, ids: list[int], versions: list[tuple[int, int, WeightVersion]]
    ) -> Any:
        return Rollout(
            rollout_id=f"step-000007/prompt-0000/sample-0{number}",
            prompt=Prompt(
                prompt_id="train.jsonl:17",
                token_ids=np.array([11, 12, 13]),
                task_data={"answer": "42"},
            ),
            sampling=SamplingSpec(
                temperature=0.75, top_p=0.5, top_k=20, max_new_tokens=8, seed=number
            ),
            response_ids=np.array(ids),
            sampled=(TokenSpan(start=0, stop=len(ids)),),
            behavior_logprobs=-np.array(ids) / 64,
            versions=tuple(VersionSpan(start=a, stop=b, version=v) for a, b, v in versions),
            finish_reason=FinishReason.STOP,
        )

    one = expected(0, [21, 22, 23], [(0, 1, six), (1, 3, seven)])
    two = expected(1, [31, 32], [(0, 2, seven)])
    candidates = np.array([[31, 5], [6, 32]])
    scores = [
        TeacherScore(teacher_id="t", logprobs=-np.array([1, 2, 3]) / 4),
        TopKScore(
            teacher_id="t",
            logprobs=-np.array([1, 2]) / 8,
            candidate_ids=candidates,
            candidate_logprobs=-candidates / 16,
        ),
    ]
    assert pq.read_schema(path).metadata[VERSION_KEY] == b"2"
    assert_same(read_rollouts(path), [(7, one), (7, two)])
    pairs = zip([one, two], scores, strict=True)
    assert_same(read_scored(path), [(7, ScoredRollout(rollout=r, score=s)) for r, s in pairs])


def test_only_a_file_of_schema_2_may_lack_the_sampled_spans(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = scored_rows([4, 2], [0, 1])  # sampled as a whole, both
    write_scored(path, rows, decode)
    table = pq.read_table(path).drop_columns(["sampled"])
    rewrite(path, table, "2")
    assert_same(read_scored(path), rows)
    rewrite(path, with_column(table, "response_ids", [[1] * 4, [1] * 3]), "2")
    with pytest.raises(DataError, match=r"s\.parquet, row 1 .* 3 response tokens were sampled"):
        read_scored(path)
    rewrite(path, table, "3")
    with pytest.raises(DataError, match=r"s\.parquet has no column 'sampled', which a file of sco"):
        read_scored(path)


def test_spans_of_a_file_that_says_schema_2_are_not_dropped_unseen(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    whole = rollout(np.random.default_rng(0), 5, 2)
    assert whole.num_loss_tokens < whole.num_tokens
    write_rollouts(path, [(1, whole)], decode)
    rewrite(path, pq.read_table(path), "2")
    with pytest.raises(DataError, match=r"row 0 .*9 response tokens were sampled, but there are 5"):
        read_rollouts(path)


@pytest.fixture
def taught() -> Rollout:
    """An answer of a teacher: it has no version of the student."""
    mine = rollout(np.random.default_rng(1), 4, 1)
    return replace(mine, versions=(), teacher_id="teacher#ab@float32")


def test_who_sampled_a_rollout_is_kept(tmp_path: Path, taught: Rollout) -> None:
    path = tmp_path / "r.parquet"
    mine = rollout(np.random.default_rng(2), 4, 0)
    write_rollouts(path, [(1, taught), (1, mine)], decode)
    assert_same(read_rollouts(path), [(1, taught), (1, mine)])
    assert pq.read_table(path)["sampled_by_teacher"].to_pylist() == ["teacher#ab@float32", ""]
    assert_same(read_training(path), [(1, TrainingRollout(rollout=r)) for r in (taught, mine)])


def test_a_file_of_schema_3_was_sampled_by_the_student(tmp_path: Path, taught: Rollout) -> None:
    path = tmp_path / "s.parquet"
    rows = write_sample(path)
    rewrite(path, pq.read_table(path).drop_columns(["sampled_by_teacher"]), "3")
    assert_same(read_scored(path), rows)
    write_rollouts(path, [(1, taught)], decode)
    rewrite(path, pq.read_table(path), "3")
    with pytest.raises(DataError, match=r"row 0 .*do not tile"):  # not taken for the student's
        read_rollouts(path)


def test_what_the_teacher_reads_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    same, told = (rollout(np.random.default_rng(seed), 4, 0) for seed in (1, 2))
    told = replace(told, prompt=replace(told.prompt, teacher_ids=np.array([7, 8, 9, 10])))
    write_rollouts(path, [(1, same), (2, told)], decode)
    assert_same(read_rollouts(path), [(1, same), (2, told)])
    assert pq.read_table(path)["teacher_prompt_ids"].to_pylist() == [[], [7, 8, 9, 10]]
    above = 2**31 - 1
    tall = replace(told, prompt=replace(told.prompt, teacher_ids=np.array([7, above])))
    write_rollouts(path, [(1, tall)], decode)
    with pytest.raises(DataError, match=rf"row 0 has the token id {above} in teacher_prompt_ids"):
        read_rollouts(path, vocab_size=above)


def test_a_file_of_schema_4_was_scored_behind_the_students_prompt(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = write_sample(path)
    rewrite(path, pq.read_table(path).drop_columns(["teacher_prompt_ids"]), "4")
    assert_same(read_scored(path), rows)


def test_training_rollouts_keep_the_scores_that_a_file_has(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    assert_same(read_training(path) if write_sample(path) else [], read_scored(path))


def test_extra_columns_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = write_sample(path)
    rewrite(path, pq.read_table(path).append_column("note", pa.array(["x"] * 4)))
    assert_same(read_scored(path), rows)


def test_missing_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    with pytest.raises(DataError, match=r"s\.parquet does not exist"):
        read_scored(path)
    with pytest.raises(DataError, match="is a folder"):
        read_scored(tmp_path)
    rows = write_sample(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"s\.parquet cannot be read as Parquet"):
        read_scored(path)
    # One bit in the data of a float column: only the page checksum can tell.
    metadata = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0)
    column = next(
        metadata.column(i)
        for i in range(metadata.num_columns)
        if metadata.column(i).path_in_schema.startswith("behavior_logprobs")
    )
    start = column.dictionary_page_offset or column.data_page_offset
    position = start + column.total_compressed_size - 3
    damaged = bytearray(whole)
    damaged[position] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"s\.parquet cannot be read as Parquet"):
        read_scored(path)
    path.write_bytes(whole)
    assert_same(read_scored(path), rows)


# --- What a file says about a model ---------------------------------------------------------------


def largest_id(rows: list[tuple[int, ScoredRollout]]) -> int:
    """The largest token id of a file, candidates included."""
    arrays = [
        array for _, s in rows for array in (s.rollout.prompt.token_ids, s.rollout.response_ids)
    ]
    arrays += [s.score.candidate_ids for _, s in rows if isinstance(s.score, TopKScore)]
    return max(int(array.max()) for array in arrays)


def test_ids_outside_of_the_vocabulary_are_refused_at_reading(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = write_sample(path)
    largest = largest_id(rows)
    assert len(read_scored(path, vocab_size=largest + 1)) == len(rows)
    with pytest.raises(DataError, match=rf"row \d+ has the token id {largest} in \w+, expected"):
        read_scored(path, vocab_size=largest)
    with pytest.raises(DataError, match="the file is of another model"):
        read_rollouts(path, vocab_size=1)


def test_a_negative_id_is_none(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    for name in ("prompt_ids", "response_ids"):
        table = pq.read_table(path)
        values = table.column(name).to_pylist()
        values[1][0] = -1
        other = tmp_path / f"{name}.parquet"
        rewrite(other, with_column(table, name, values))
        with pytest.raises(DataError, match=r"row 1 .*-1 is no token id"):
            read_scored(other)


def test_candidates_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    table = pq.read_table(path)
    values = table.column("candidate_ids").to_pylist()
    row = next(index for index, value in enumerate(values) if value is not None)
    values[row][0][1] = values[row][0][0]
    rewrite(path, with_column(table, "candidate_ids", values))
    with pytest.raises(DataError, match=f"row {row} .*has an id twice"):
        read_scored(path)


def test_a_rollout_twice_in_a_step_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    write_sample(path)
    table = pq.read_table(path)
    rewrite(path, pa.concat_tables([table, table.slice(2, 1)]))
    with pytest.raises(DataError, match=r"row 4 is rollout .* again, which row 2 has"):
        read_rollouts(path)


def test_hidden_states_of_another_teacher_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    rows = write_sample(path)
    (size,) = {s.score.hidden.shape[1] for _, s in rows if isinstance(s.score, HiddenScore)}
    assert len(read_scored(path, hidden_size=size)) == len(rows)
    with pytest.raises(DataError, match=f"hidden states of {size} numbers, expected the teacher's"):
        read_scored(path, hidden_size=size + 1)
