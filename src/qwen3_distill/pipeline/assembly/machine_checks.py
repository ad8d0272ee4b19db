"""Checks whether this machine has what the engines of a config need, one `Check` each."""

import re
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from qwen3_distill.config import LoraTuning, RunConfig, ScoringConfig
from qwen3_distill.environments.installed import machine_kind
from qwen3_distill.environments.pins import tested_versions
from qwen3_distill.errors import ModelError
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.pipeline.assembly.channel import samples_elsewhere, shared_memory_dir
from qwen3_distill.pipeline.assembly.engines import engine_interpreters, served_adapter
from qwen3_distill.pipeline.assembly.machine import (
    NAMES,
    Name,
    device_problem,
    interpreter_problem,
    missing_environments,
    sections_of,
)
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.disk_space import student_bytes
from qwen3_distill.pipeline.finding import (
    Check,
    Status,
    Verdict,
    bad,
    doubtful,
    good,
    problem,
    skipped,
)
from qwen3_distill.pipeline.manifest import engine_versions
from qwen3_distill.planning.gpu import detect_gpu
from qwen3_distill.recording.text import gibibytes
from qwen3_distill.utils.json_text import read_json_object

_OLDEST_DRIVER = 580
"""The first driver of CUDA 13, for which the engines of `environments` are built."""
_FP8_CAPABILITY = (8, 9)
"""The first GPUs that compute in FP8 (Ada; Hopper is 9.0)."""
_ADAPTER_BYTES = 4
_VERSIONS_KEPT = 2
"""The channel holds a version until the next one is written."""
_INFERRING: tuple[Name, ...] = ("generation", "scoring")
_ALL_EMBEDDED = "all engines are embedded, or run elsewhere"
_REQUIRES_EXACT = {"unsloth"}
"""Engines below whose public functions this package reaches: other versions are refused."""


def check_gpu(config: RunConfig) -> Verdict:
    """Check that there is a CUDA device where the config needs one."""
    if (lacking := device_problem(config)) is not None:
        return problem(lacking)
    return good("an NVIDIA driver is seen" if machine_kind() == "cuda" else "none, and none needed")


def check_environments(config: RunConfig) -> Verdict:
    """Check that the engines without a stated interpreter are installed on this machine."""
    lacking = missing_environments(config)
    return good("all that the config uses") if lacking is None else problem(lacking)


def check_interpreter(name: Name, config: RunConfig) -> Verdict:
    """Check that the interpreter of a section exists.

    Args:
        name: of the section.
    """
    if (lacking := interpreter_problem(config, name)) is not None:
        return problem(lacking)
    sections = sections_of(config, name).values()
    if not sections:
        return skipped("training loads no teacher")
    stated = dict.fromkeys(one.interpreter for one in sections if one.interpreter is not None)
    return good(", ".join(stated)) if stated else skipped("none is stated")


def check_driver(config: RunConfig) -> Verdict:
    """Check that the driver can run the engines that are installed, and name the GPU."""
    if not engine_interpreters(config):
        return skipped(_ALL_EMBEDDED)
    gpu = detect_gpu()
    if gpu is None:
        return skipped("no NVIDIA GPU: every engine runs on the CPU")
    text = (
        f"{gpu.name}, {gpu.memory}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"driver {gpu.driver}"
    )
    major = gpu.driver.partition(".")[0]
    if major.isdigit() and int(major) < _OLDEST_DRIVER:
        return doubtful(
            f"{text}; the locked engines are built for CUDA 13, which needs driver "
            f"{_OLDEST_DRIVER} or newer",
            "update the driver, or use engines built for its CUDA",
        )
    return good(text)


def check_fp8(config: RunConfig) -> Verdict:
    """Check that the GPU computes in FP8 where the config asks for it."""
    on_gpu, anywhere = _uses_of_fp8(config)
    if not (on_gpu or anywhere):
        return skipped("nothing is quantized here")
    gpu = detect_gpu()
    if gpu is None and on_gpu:
        return bad(
            f"no GPU is here, as is needed for {', '.join(on_gpu)}",
            "set quantization=null, and use a teacher that is not quantized",
        )
    if gpu is None:
        return good(f"{', '.join(anywhere)} on a CPU, where vLLM needs AVX-512 or AMX for it")
    text = f"{', '.join([*on_gpu, *anywhere])} on compute capability "
    text += f"{gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability < _FP8_CAPABILITY:
        return doubtful(
            f"{text}: FP8 is computed from {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} on",
            "if the engine does not start, set quantization=null and "
            "generation.kv_cache_dtype=auto; memory is saved here, not time",
        )
    return good(text)


def _uses_of_fp8(config: RunConfig) -> tuple[list[str], list[str]]:
    """Name what is in FP8: what only a GPU computes, and what vLLM computes on a CPU, too."""
    on_gpu = [
        f"{setting}.quantization=fp8"
        for name in _INFERRING
        for setting, section in sections_of(config, name).items()
        if getattr(section, "quantization", None) == "fp8" and not getattr(section, "urls", ())
    ]
    anywhere = list[str]()
    if getattr(config.generation, "kv_cache_dtype", "auto") == "fp8":
        anywhere.append("generation.kv_cache_dtype=fp8")
    for teacher in config.loaded_teachers:
        if getattr(teacher.section, "urls", ()):
            continue
        with suppress(ModelError):
            shape = read_shape(teacher.section.model)
            if shape.fp8_checkpoint:
                by_vllm = shape.fp8_per_channel and teacher.section.kind == "vllm"
                of = anywhere if by_vllm else on_gpu
                of.append(f"the FP8 checkpoint of {teacher.setting}.model")
    return on_gpu, anywhere


def check_flashinfer(config: RunConfig) -> Verdict:
    """Check that the compiler is here that FlashInfer takes for its kernels."""
    lacking, found = list[str](), list[str]()
    for name in _INFERRING:
        for setting, section in sections_of(config, name).items():
            if getattr(section, "attention_backend", None) != "flashinfer":
                continue
            if getattr(section, "urls", ()):  # it is on the server's machine
                continue
            own = getattr(section, "environment", {})
            compiler = shutil.which("nvcc", path=own.get("PATH"))
            text = f"{setting}.attention_backend=flashinfer"
            found.append(f"{text} with {compiler}")
            if compiler is None:
                lacking.append(text)
    if lacking:
        return doubtful(
            f"{', '.join(lacking)}: FlashInfer compiles kernels when it first needs them, and "
            "nvcc is not on PATH",
            "put the bin folder of CUDA's toolkit on PATH, or set attention_backend=null",
        )
    return good(", ".join(found)) if found else skipped("no engine here takes FlashInfer")


def check_versions(config: RunConfig) -> Verdict:
    """Compare the engines' installed versions with the tested ones, without importing them."""
    interpreters = engine_interpreters(config)
    if not interpreters:
        return skipped(_ALL_EMBEDDED)
    found = engine_versions(interpreters)
    silent = [kind for kind in interpreters if kind not in found]
    verdicts = [_judged(kind.partition(":")[0], versions) for kind, versions in found.items()]
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


def server_limits(config: RunConfig) -> dict[str, int]:
    """Return the limits of the teachers' servers on the student's tokens, by setting."""
    stated = {
        f"{teacher.setting}.max_model_tokens": getattr(teacher.section, "max_model_tokens", None)
        for teacher in config.loaded_teachers
        if not teacher.section.has_own_tokenizer  # it reads others: `tokenizer_checks`
    }
    return {name: limit for name, limit in stated.items() if limit is not None}


def quantization_of(config: RunConfig) -> str | None:
    """Return how the teacher's weights are quantized: by its server, or in its directory.

    None: they are not, or there is no teacher. Of several teachers, the first quantized one's.
    """
    found = (_quantization(teacher.section) for teacher in config.teachers)
    return next((quantization for quantization in found if quantization is not None), None)


def _quantization(scoring: ScoringConfig) -> str | None:
    if (quantization := getattr(scoring, "quantization", None)) is not None:
        return str(quantization)
    file = Path(scoring.model) / "config.json"
    with suppress(OSError, ValueError, AttributeError):
        settings = read_json_object(file).get("quantization_config")
        return None if settings is None else str(settings.get("quant_method"))
    return None


_STARTABLE = ("installed engines", *(f"{name} interpreter" for name in NAMES))
MACHINE_CHECKS = (
    Check(name="GPU", find=check_gpu, refuses_run=True),
    Check(name="FP8 on this GPU", find=check_fp8, refuses_run=True, notes_run=True),
    Check(name="FlashInfer's compiler", find=check_flashinfer, notes_run=True),
    Check(name="installed engines", find=check_environments, refuses_run=True),
    *(
        Check(
            name=f"{name} interpreter",
            find=partial(check_interpreter, name),
            refuses_run=True,
        )
        for name in NAMES
    ),
    Check(name="driver", find=check_driver, needs=_STARTABLE, notes_run=True),
    Check(
        name="engine versions",
        find=check_versions,
        needs=_STARTABLE,
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
