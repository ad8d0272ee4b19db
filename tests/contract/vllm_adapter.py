"""Real vLLM for the contract suite of `RolloutEngine`. A start takes 20 s, so engines are kept."""

import atexit
import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from qwen3_distill.config import LoraTuning, VllmGeneration
from qwen3_distill.errors import WeightVersionError
from qwen3_distill.generation.hosted import HostedRolloutEngine
from qwen3_distill.generation.vllm.engine import vllm_engine
from qwen3_distill.hosts.host import MakeHost
from qwen3_distill.hosts.process import LocalProcess
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.builders import run
from tests.engines import INSTALLED, LOGS

KV_CACHE_BYTES = 128 << 20


def environment_with_tests() -> dict[str, str]:
    """vLLM's variables, and these tests where it finds their modules."""
    variables = INSTALLED.variables.get("vllm", {})
    path = filter(None, [str(Path(__file__).parents[2]), variables.get("PYTHONPATH")])
    return {**variables, "PYTHONPATH": os.pathsep.join(path)}


def vllm_config(**changes: object) -> VllmGeneration:
    """Small, float32, for wherever the tests run."""
    slow = [] if INSTALLED.device == "cuda" else ["tests.contract.slow_steps:SlowSteps"]
    values: dict[str, object] = {
        "kind": "vllm",
        "dtype": "float32",
        "max_sequences": 64,
        "python": INSTALLED.python.get("vllm"),
        "environment": {
            "OMP_NUM_THREADS": "1",  # threads that wait for one another starve the other processes
            "TRITON_F32_DEFAULT": "ieee",  # attention in float32 is TF32 on a GPU otherwise
            **environment_with_tests(),
        },
        "enforce_eager": True,
        "stream_interval": 4,
        "engine_arguments": {"logits_processors": slow},
    }
    return VllmGeneration.model_validate(values | changes)


def build_vllm(
    model_dir: Path,
    *,
    lora: LoraTuning | None = None,
    make_host: MakeHost = LocalProcess,
    **changes: object,
) -> HostedRolloutEngine:
    """An engine of its own, started."""
    engine = vllm_engine(
        model_dir,
        vllm_config(**changes),
        lora=lora,
        kv_cache_bytes=KV_CACHE_BYTES,
        log=LOGS / "vllm.log",
        num_candidates=24,  # vLLM's own limit is 20
        make_host=make_host,
    )
    run(engine.start())
    return engine


KEPT_ENGINES = 2


@dataclass
class VllmEngineAdapter:
    """Keeps the last engines by model and batch limit; `build` gives one back without weights."""

    keeps_cache_over_updates: bool = True
    _kept: dict[tuple[str, int], HostedRolloutEngine] = field(default_factory=dict)

    def build(self, model_dir: Path, *, max_sequences: int = 64) -> HostedRolloutEngine:
        key = (str(model_dir), min(max_sequences, 256))
        engine = self._kept.pop(key, None)
        if engine is None:
            if not self._kept:
                atexit.register(self.close)
            while len(self._kept) >= KEPT_ENGINES:
                self._end(self._kept.pop(next(iter(self._kept))))
            engine = build_vllm(model_dir, max_sequences=key[1])
        self._kept[key] = engine  # the last used stands last
        with contextlib.suppress(WeightVersionError):  # serves nothing from here on
            run(engine.load(WeightVersion(step=0, digest="absent"), MemoryChannel()))
        return engine

    def close(self) -> None:
        while self._kept:
            self._end(self._kept.popitem()[1])

    def _end(self, engine: HostedRolloutEngine) -> None:
        engine.host.kill()  # a graceful end takes seconds and keeps nothing
        run(engine.close())
