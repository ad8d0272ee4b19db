"""SGLang for the contract suite of `TeacherScorer`. A start takes 20 s, so servers are kept."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwen3_distill.config import SglangScoring
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.types import ModelIdentity, SampledRequest, ScoreRequest, ScoreResult, ScoringJob
from tests.contract.builders import run
from tests.engines import INSTALLED
from tests.sglang_stand_in import write_interpreter

Kind = Literal["stand_in", "real"]

KEPT_SERVERS = 3
SMALL_CHUNKS = 7
"""A server's chunks are set at its start: one server has small ones, one has large ones."""
_FOLDER = Path(tempfile.mkdtemp(prefix="qwen3-distill-tests-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = str(_FOLDER / "cache")  # no test reads or leaves a known answer


def sglang_config(model_dir: Path, kind: Kind, **changes: object) -> SglangScoring:
    """Return a small config: float32, but not on a GPU, where SGLang has no kernels for it."""
    on_gpu = kind == "real" and INSTALLED.device == "cuda"
    values: dict[str, object] = {
        "kind": "sglang",
        "model": str(model_dir),
        "python": INSTALLED.python.get("sglang")
        if kind == "real"
        else write_interpreter(_FOLDER / "python"),
        "environment": {
            "OMP_NUM_THREADS": "1",
            "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
            **(INSTALLED.variables.get("sglang", {}) if kind == "real" else {}),
        },
        "device": "cuda" if on_gpu else "cpu",
        "dtype": "bfloat16" if on_gpu else "float32",
        "float32_head": on_gpu,
        "quantization": None,
        # FlashAttention is not in every environment; SGLang would choose it.
        "attention_backend": "triton" if on_gpu else None,
    }
    return SglangScoring.model_validate(values | changes)


def build_sglang(
    config: SglangScoring,
    request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
) -> SglangTeacher:
    """Return a teacher that is not started."""
    on_gpu = config.device == "cuda"
    return SglangTeacher(
        config,
        request=request,
        memory_fraction=0.1 if on_gpu else None,
        max_total_tokens=32768,
        log=_FOLDER / "server.log",
    )


@dataclass
class ServerPool:
    """Keeps the last servers, by model and settings."""

    _kept: dict[tuple[object, ...], SglangTeacher] = field(default_factory=dict)

    async def connect(self, config: SglangScoring) -> SglangScoring:
        """Return the config of a teacher in a kept server; start one if none is kept."""
        key = (config.model, config.python, config.quantization, config.chunk_tokens)
        owner = self._kept.pop(key, None)
        if owner is None:
            if not self._kept:
                atexit.register(self.close)
            while len(self._kept) >= KEPT_SERVERS:
                await self._kept.pop(next(iter(self._kept))).close()
            owner = build_sglang(config)
            await owner.start()
        self._kept[key] = owner  # the last used stands last
        server = owner.server
        assert server is not None
        key_file = _FOLDER / f"key-{server.url.rpartition(':')[2]}"
        key_file.write_text(server.api_key)
        return config.model_copy(update={"urls": (server.url,), "api_key_file": str(key_file)})

    def close(self) -> None:
        while self._kept:
            run(self._kept.popitem()[1].close())


POOL = ServerPool()


class PooledTeacher:
    """An `SglangTeacher` that uses a kept server."""

    def __init__(self, config: SglangScoring, request: ScoreRequest) -> None:
        self._config = config
        self._request = request
        self._teacher = build_sglang(config, request)

    async def start(self) -> None:
        self._teacher = build_sglang(await POOL.connect(self._config), self._request)
        await self._teacher.start()

    @property
    def identity(self) -> ModelIdentity:
        return self._teacher.identity

    @property
    def teacher_id(self) -> str:
        return self._teacher.teacher_id

    @property
    def counters(self) -> Mapping[str, float]:
        return self._teacher.counters

    @property
    def max_dropped_fraction(self) -> float:
        return self._teacher.max_dropped_fraction

    @property
    def starts_first(self) -> bool:
        return self._teacher.starts_first

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoreResult]:
        return await self._teacher.score(jobs)

    async def close(self) -> None:
        await self._teacher.close()


@dataclass(frozen=True)
class SglangTeacherAdapter:
    kind: Kind
    quantization: Literal["fp8"] | None = None

    @property
    def gives_hidden_states(self) -> bool:
        return False

    @property
    def parity_nats(self) -> float:
        if self.quantization is not None:
            return 2.0  # 0.15 on average was seen in a simulation, 0.6 at most for 99%
        # bfloat16: 0.16 was seen, in a rollout of 1,004 tokens.
        return 0.25 if self._on_gpu else 1e-4

    @property
    def decoded_parity_nats(self) -> float:
        """Tolerance for logprobs of tokens that were decoded one by one."""
        return 0.3 if self._on_gpu else 5e-4

    @property
    def repeat_nats(self) -> float:
        if self.quantization is not None:
            return 0.5  # a changed bit of an activation may round to another FP8 number
        return 0.05 if self._on_gpu else 1e-5

    @property
    def tokens_that_show_a_fault(self) -> int:
        if self.quantization is not None:
            return 12
        return 6 if self._on_gpu else 3

    @property
    def _on_gpu(self) -> bool:
        return self.kind == "real" and INSTALLED.device == "cuda"

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> PooledTeacher:
        chunk = SMALL_CHUNKS if chunk_tokens <= SMALL_CHUNKS else 2048
        config = sglang_config(
            model_dir,
            self.kind,
            quantization=self.quantization,
            request_tokens=batch_tokens,
            chunk_tokens=chunk,
            chunked_prefill_tokens=8192 if chunk > SMALL_CHUNKS else 64,
        )
        return PooledTeacher(config, request)
