"""Checks whether this machine has what the engines of a config need."""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from qwen3_distill.config import LoraTuning, RunConfig
from qwen3_distill.environments.pins import tested_versions
from qwen3_distill.errors import ModelError
from qwen3_distill.hosts.child import is_absent
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.pipeline.assembly.channel import samples_elsewhere, shared_memory_dir
from qwen3_distill.pipeline.assembly.engines import engine_interpreters, served_adapter
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.disk_space import student_bytes
from qwen3_distill.pipeline.finding import Check, Status, Verdict, bad, doubtful, good, skipped
from qwen3_distill.pipeline.manifest import engine_versions
from qwen3_distill.planning.gpu import detect_gpu
from qwen3_distill.recording.text import gibibytes

_OLDEST_DRIVER = 580
"""The first driver of CUDA 13, for which the engines of `environments` are built."""
_FP8_CAPABILITY = (8, 9)
"""The first GPUs that compute in FP8 (Ada; Hopper is 9.0)."""
_ADAPTER_BYTES = 4
_VERSIONS_KEPT = 2
"""The channel holds a version until the next one is written."""
_REQUIRES_EXACT = {"unsloth"}
"""Engines below whose public functions this package reaches: other versions are refused."""


def check_driver(config: RunConfig) -> Verdict:
    """Check that there is a GPU where the config needs one, and its driver's version."""
    gpu = detect_gpu()
    wanted = [
        f"{name}.device=cuda"
        for name in ("generation", "scoring", "training")
        if getattr(getattr(config, name), "device", None) == "cuda"
    ]
    if gpu is None:
        if wanted:
            return bad(
                f"{', '.join(wanted)}, but the NVIDIA driver shows no GPU",
                "make `nvidia-smi` work here (driver, container's GPU access, "
                "CUDA_VISIBLE_DEVICES), or set device=cpu",
            )
        return good("no NVIDIA GPU: every engine runs on the CPU")
    text = (
        f"{gpu.name}, {gpu.memory}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"driver {gpu.driver}"
    )
    major = gpu.driver.partition(".")[0]
    if engine_interpreters(config) and major.isdigit() and int(major) < _OLDEST_DRIVER:
        return doubtful(
            f"{text}; the locked engines are built for CUDA 13, which needs driver "
            f"{_OLDEST_DRIVER} or newer",
            "update the driver, or use engines built for its CUDA",
        )
    return good(text)


def check_fp8(config: RunConfig) -> Verdict:
    """Check that the GPU computes in FP8 where the config asks for it."""
    users = [
        f"{name}.quantization=fp8"
        for name in ("generation", "scoring")
        if getattr(getattr(config, name), "quantization", None) == "fp8"
        and not getattr(getattr(config, name), "urls", ())
    ]
    with suppress(ModelError):
        if read_shape(config.scoring.model).fp8_checkpoint and not getattr(
            config.scoring, "urls", ()
        ):
            users.append("scoring.model is an FP8 checkpoint")
    if not users:
        return skipped("nothing is quantized here")
    what = ", ".join(users)
    gpu = detect_gpu()
    if gpu is None:
        return bad(
            f"{what} needs a GPU, and there is none",
            "set quantization=null, and use a teacher that is not quantized",
        )
    text = f"{what} on compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability < _FP8_CAPABILITY:
        return doubtful(
            f"{text}: FP8 is computed from {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} on",
            "set quantization=null if the engine does not start; memory is saved here, not time",
        )
    return good(text)


def check_interpreter(name: str, config: RunConfig) -> Verdict:
    """Check that the interpreter of a section exists.

    Args:
        name: of the section: generation, scoring or training.
    """
    python = getattr(config, name).interpreter
    if python is not None and is_absent(python):
        return bad(
            f"{name}.python={python} does not exist or cannot be run",
            "give the interpreter of an environment that has the engine (docs/engines/install.md)",
        )
    return good(str(python)) if python is not None else skipped("the controller's own interpreter")


def check_versions(config: RunConfig) -> Verdict:
    """Compare the engines' installed versions with the tested ones, without importing them."""
    interpreters = engine_interpreters(config)
    if not interpreters:
        return skipped("all engines are embedded, or run elsewhere")
    found = engine_versions(interpreters)
    silent = [kind for kind in interpreters if kind not in found]
    verdicts = [_judged(kind, versions) for kind, versions in found.items()]
    for status in (Status.FAIL, Status.WARN):
        if worst := [verdict for verdict in verdicts if verdict.status is status]:
            return replace(worst[0], found=", ".join(verdict.found for verdict in worst))
    if silent:
        python = interpreters[silent[0]].python
        return doubtful(
            f"{python} does not say what is installed for {silent[0]}",
            f"run `{python} -c 'import sys'` and see why",
        )
    return good(", ".join(verdict.found for verdict in verdicts))


def _judged(kind: str, versions: dict[str, str]) -> Verdict:
    tested = tested_versions(kind)
    installed = {name: versions[name] for name in tested if name in versions}
    install = "make the engine's environment again (docs/engines/install.md)"
    if not installed:
        return bad(f"{kind} is not installed for its interpreter", install)
    torch = f" (torch {versions['torch']})" if "torch" in versions else ""
    text = ", ".join(f"{name} {version}" for name, version in installed.items()) + torch
    for name, version in installed.items():
        if _plain(version) in tested[name]:
            continue
        pins = ", ".join(sorted(set().union(*tested.values())))
        what = f"{name} {version}, tested with {pins}"
        if kind in _REQUIRES_EXACT or _order(version) < min(map(_order, tested[name])):
            return bad(what, install)
        return doubtful(what, f"if something fails below, {install}")
    return good(text)


def _plain(version: str) -> str:
    return version.partition("+")[0]


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", _plain(version)))


def check_shared_memory(config: RunConfig) -> Verdict:
    """Check that the folder in memory takes two versions of what is pushed to the engine."""
    generation = config.generation
    if not samples_elsewhere(generation):
        return skipped("weights stay in this process")
    tuning = served_adapter(generation, config.training.tuning)
    if isinstance(tuning, LoraTuning):
        shape = read_shape(config.student.model)
        pushed = _ADAPTER_BYTES * shape.lora_parameters(tuning.rank, tuning.target_modules)
    else:
        pushed = student_bytes(config)
    needed = _VERSIONS_KEPT * pushed
    folder = shared_memory_dir()
    free = shutil.disk_usage(folder).free
    text = f"{folder} has {gibibytes(free)} free, two weight versions need {gibibytes(needed)}"
    if free >= needed:
        return good(text)
    change = "free it, or start the container with a larger --shm-size"
    if tuning is None and getattr(generation, "full_weights", "") != "directory" and detect_gpu():
        return doubtful(f"{text}, if they cannot be passed on the GPU", change)
    return bad(text, change)


def check_plan(config: RunConfig) -> Verdict:
    """Plan the memory of the engines.

    Raises:
        ConfigError: it does not fit.
    """
    plan = plan_memory(config)
    if plan is None:
        return skipped("all engines are embedded and share one allocator")
    needed, free = gibibytes(plan.required_bytes), gibibytes(plan.device.free_bytes)
    return good(f"the engines need {needed} of {free} ({plan.device.name})")


def sequence_limits(config: RunConfig) -> dict[str, int]:
    """Return the stated limits on prompt plus response tokens, by setting."""
    limits = {
        f"{name}.max_model_tokens": getattr(getattr(config, name), "max_model_tokens", None)
        for name in ("generation", "training")
    }
    return {name: limit for name, limit in limits.items() if limit is not None}


def quantization_of(config: RunConfig) -> str | None:
    """Return how the teacher's weights are quantized: by its server, or in its directory."""
    if getattr(config.scoring, "quantization", None) is not None:
        return str(config.scoring.quantization)  # type: ignore[union-attr]
    file = Path(config.scoring.model) / "config.json"
    with suppress(OSError, ValueError, AttributeError):
        settings = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        return None if settings is None else str(settings.get("quant_method"))
    return None


MACHINE_CHECKS = (
    Check(name="driver and GPU", find=check_driver, notes_run=True),
    Check(name="FP8 on this GPU", find=check_fp8, refuses_run=True, notes_run=True),
    *(
        Check(
            name=f"{section} interpreter",
            find=partial(check_interpreter, section),
            refuses_run=True,
        )
        for section in ("generation", "scoring", "training")
    ),
    Check(
        name="engine versions",
        find=check_versions,
        needs=("generation interpreter", "scoring interpreter", "training interpreter"),
        refuses_run=True,
        notes_run=True,
    ),
    Check(
        name="shared memory",
        find=check_shared_memory,
        needs=("student files",),
        refuses_run=True,
        notes_run=True,
    ),
    Check(
        name="memory plan",
        find=check_plan,
        needs=("student files", "teacher files"),
    ),
)
