"""Served teachers for the contract suites. A start takes 20 to 40 s, so servers are kept."""

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import pytest

from qwen3_distill.config import SglangScoring, VllmScoring
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.sglang.server import MemoryFraction
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.scoring.vllm.teacher import VllmTeacher
from qwen3_distill.scoring.wrapper import TeacherWrapper
from qwen3_distill.types import SampledRequest, ScoreRequest
from tests.contract.builders import run
from tests.engines import INSTALLED
from tests.sglang_stand_in import write_interpreter

Kind = Literal["stand_in", "real"]
Engine = Literal["sglang", "vllm"]
ServedConfig: TypeAlias = SglangScoring | VllmScoring

KEPT_SERVERS = 3
KV_CACHE_BYTES = 128 << 20
SMALL_CHUNKS = 7
"""A server's chunks are set at its start: one server has small ones, one has large ones."""
_FOLDER = Path(tempfile.mkdtemp(prefix="qwen3-distill-tests-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = str(_FOLDER / "cache")  # no test reads or leaves a known answer


@dataclass(frozen=True)
class Served:
    """A served teacher that the suites run on: an engine, or what stands in for it."""

    engine: Engine
    kind: Kind

    @property
    def name(self) -> str:
        """The engine's name in errors."""
        return {"sglang": "SGLang", "vllm": "vLLM"}[self.engine]

    @property
    def on_gpu(self) -> bool:
        return self.kind == "real" and INSTALLED.device == "cuda"

    @property
    def adapter(self) -> "ServedTeacherAdapter":
        return ServedTeacherAdapter(self)

    def interpreter(self, path: Path, prelude: str = "") -> str:
        """Write a stand-in's interpreter."""
        return write_interpreter(path, prelude, self.engine)

    def config(self, model_dir: Path, **changes: object) -> ServedConfig:
        """Return a small config: float32, but not for SGLang on a GPU, which lacks kernels."""
        low = self.on_gpu and self.engine == "sglang"
        values: dict[str, object] = {
            "kind": self.engine,
            "model": str(model_dir),
            "python": INSTALLED.python.get(self.engine)
            if self.kind == "real"
            else self.interpreter(_FOLDER / f"python-{self.engine}"),
            "environment": {
                "OMP_NUM_THREADS": "1",
                "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
                "TRITON_F32_DEFAULT": "ieee",
                **(INSTALLED.variables.get(self.engine, {}) if self.kind == "real" else {}),
            },
            "device": "cuda" if self.on_gpu else "cpu",
            "dtype": "bfloat16" if low else "float32",
            "float32_head": low,
            "quantization": None,
        }
        if self.engine == "vllm":
            return VllmScoring.model_validate({"max_sequences": 64} | values | changes)
        # FlashAttention is not in every environment; SGLang would choose it.
        values["attention_backend"] = "triton" if self.on_gpu else None
        return SglangScoring.model_validate(values | changes)


SGLANG_STAND_IN = Served("sglang", "stand_in")
VLLM_STAND_IN = Served("vllm", "stand_in")
STAND_INS = [
    pytest.param(SGLANG_STAND_IN, id="sglang_stand_in"),
    pytest.param(VLLM_STAND_IN, id="vllm_stand_in"),
]
SERVED = [
    *STAND_INS,
    pytest.param(Served("sglang", "real"), id="sglang", marks=pytest.mark.sglang),
    pytest.param(Served("vllm", "real"), id="vllm", marks=pytest.mark.vllm),
]


def sglang_config(model_dir: Path, kind: Kind, **changes: object) -> SglangScoring:
    """Return a small config of SGLang."""
    config = Served("sglang", kind).config(model_dir, **changes)
    assert isinstance(config, SglangScoring)
    return config


def build_served(
    config: ServedConfig,
    request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
    *,
    memory_fraction: MemoryFraction = None,
    log: Path = _FOLDER / "server.log",
) -> ServedTeacher:
    """Return a teacher that is not started.

    Args:
        memory_fraction: of SGLang's server; None: small.
    """
    if isinstance(config, VllmScoring):
        return VllmTeacher(config, request=request, kv_cache_bytes=KV_CACHE_BYTES, log=log)
    return SglangTeacher(
        config,
        request=request,
        memory_fraction=memory_fraction or (0.1 if config.device == "cuda" else None),
        max_total_tokens=32768,
        log=log,
    )


@dataclass
class ServerPool:
    """Keeps the last servers, by model and settings."""

    _kept: dict[tuple[object, ...], ServedTeacher] = field(default_factory=dict)

    async def connect(self, config: ServedConfig) -> ServedConfig:
        """Return the config of a teacher in a kept server; start one if none is kept."""
        key = (
            config.kind,
            config.model,
            config.python,
            config.quantization,
            config.chunked_prefill_tokens,
        )
        owner = self._kept.pop(key, None)
        if owner is None:
            if not self._kept:
                atexit.register(self.close)
            while len(self._kept) >= KEPT_SERVERS:
                await self._kept.pop(next(iter(self._kept))).close()
            owner = build_served(config)
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


class PooledTeacher(TeacherWrapper[ServedTeacher]):
    """A `ServedTeacher` that uses a kept server."""

    def __init__(self, config: ServedConfig, request: ScoreRequest) -> None:
        super().__init__(build_served(config, request))
        self._config = config
        self._request = request

    async def start(self) -> None:
        self.inner = build_served(await POOL.connect(self._config), self._request)
        await super().start()


@dataclass(frozen=True)
class ServedTeacherAdapter:
    served: Served
    quantization: Literal["fp8"] | None = None

    @property
    def gives_hidden_states(self) -> bool:
        return False

    @property
    def scores_given_candidates(self) -> bool:
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
        return self.served.on_gpu

    def build(
        self,
        model_dir: Path,
        request: ScoreRequest = SampledRequest(),  # noqa: B008 - frozen
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 1024,
    ) -> PooledTeacher:
        small = chunk_tokens <= SMALL_CHUNKS
        changes: dict[str, object] = {"chunked_prefill_tokens": 64 if small else 8192}
        if self.served.engine == "sglang":
            changes["chunk_tokens"] = SMALL_CHUNKS if small else 2048
        config = self.served.config(
            model_dir, quantization=self.quantization, request_tokens=batch_tokens, **changes
        )
        return PooledTeacher(config, request)


SERVED_TEACHERS = [
    pytest.param(SGLANG_STAND_IN.adapter, id="sglang_stand_in"),
    pytest.param(VLLM_STAND_IN.adapter, id="vllm_stand_in"),
    pytest.param(Served("sglang", "real").adapter, id="sglang", marks=pytest.mark.sglang),
    pytest.param(Served("vllm", "real").adapter, id="vllm", marks=pytest.mark.vllm),
]
