"""Teachers of all kinds are built from one config; no server is started."""

from pathlib import Path
from typing import Any

from qwen3_distill.pipeline.assembly.engines import engine_interpreters
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.assembly.teachers import build_teacher
from qwen3_distill.scoring.by_tag import TeachersByTag
from qwen3_distill.scoring.cache import CachedTeacher
from qwen3_distill.scoring.embedded.teacher import EmbeddedTeacher
from qwen3_distill.scoring.ensemble import EnsembleTeacher
from qwen3_distill.scoring.sglang.teacher import SglangTeacher
from qwen3_distill.scoring.vllm.teacher import VllmTeacher
from tests.pipeline.builders import tiny_config
from tests.tiny_models import TinyModels

BASE: dict[str, Any] = {
    "evaluation": None,
    "verifier": None,
    "planning": {"device_memory_gib": 64},
    "prompts": {"kind": "jsonl", "path": "rows.jsonl"},
}


def test_every_kind_is_built_for_its_tag(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = {"model": str(tiny_models.teacher), "device": "cpu"}
    vllm = {"kind": "vllm", "quantization": None, **model}
    sglang = {"kind": "sglang", "quantization": None, **model}
    teachers = {
        "v": vllm | {"cache": str(tmp_path / "cache")},
        "s": sglang,
        "mean": {"kind": "ensemble", "members": [vllm, sglang, {"kind": "embedded", **model}]},
    }
    scoring = {"kind": "several", "by": "task", "teachers": teachers}
    config = tiny_config(tiny_models, tmp_path / "run", BASE | {"scoring": scoring})
    built = build_teacher(config, plan_memory(config))
    assert isinstance(built, TeachersByTag)
    assert isinstance(built.teachers["v"], CachedTeacher)
    assert isinstance(built.teachers["v"].inner, VllmTeacher)
    assert isinstance(built.teachers["s"], SglangTeacher)
    mean = built.teachers["mean"]
    assert isinstance(mean, EnsembleTeacher)
    assert [type(member) for member in mean.members] == [
        VllmTeacher,
        SglangTeacher,
        EmbeddedTeacher,
    ]
    assert built.starts_first, "SGLang's share is of what is free"


def test_two_vllms_with_interpreters_of_their_own_are_named(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    model = {"kind": "vllm", "model": str(tiny_models.teacher)}
    teachers = {"a": model | {"python": "/usr/bin/env"}, "b": model | {"python": "/bin/sh"}}
    scoring = {"kind": "several", "by": "task", "teachers": teachers}
    config = tiny_config(tiny_models, tmp_path / "run", BASE | {"scoring": scoring})
    found = engine_interpreters(config)
    assert list(found) == ["vllm", "vllm:scoring.teachers.b"]
