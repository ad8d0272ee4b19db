"""The fuzz package: its kinds run clean in small numbers, and it sees a reader that is broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.robustness.fuzz import __main__ as command
from benchmarks.robustness.fuzz import http_replies, kinds, odd_server, replies, vllm_replies
from benchmarks.robustness.fuzz.counts import Counts
from qwen3_distill.scoring.served import json_values
from qwen3_distill.scoring.sglang import candidates, wire
from qwen3_distill.scoring.vllm import wire as vllm_wire
from qwen3_distill.utils import secrets


def clean(counts: Counts, tried: int) -> None:
    assert not counts.examples
    assert (counts.tried, counts.failures) == (tried, 0)


@pytest.mark.parametrize("seed", [1, 2])
def test_odd_replies_are_read_as_the_reference_reads_them(seed: int) -> None:
    clean(replies.run(seed, 400), 400)


@pytest.mark.parametrize("seed", [1, 2])
def test_odd_replies_of_vllm_are_read_as_the_reference_reads_them(seed: int) -> None:
    clean(vllm_replies.run(seed, 400), 400)


def test_a_reader_that_takes_the_last_of_two_values_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_wire, "_refuse_repeated_names", lambda reply, choices: None)
    assert vllm_replies.run(1, 400).wrong > 10


def test_odd_http_replies_give_right_scores_or_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_replies, "TIMEOUT_S", 0.5)
    clean(http_replies.run(1, len(odd_server.ODDITIES)), len(odd_server.ODDITIES))


def coerced(values: Any, what: str) -> np.ndarray:
    return np.array(values, dtype=np.float64).astype(np.float32)


def test_a_reader_that_coerces_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "logprobs_of", coerced)
    monkeypatch.setattr(candidates, "logprobs_of", coerced)
    counts = replies.run(1, 800)
    assert counts.wrong + counts.tracebacks > 10


def test_a_reader_of_any_ids_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "integers", lambda values, what: values)
    assert replies.run(1, 2000).failures > 0


def test_a_client_that_shows_the_key_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "without_secrets", lambda text: text)
    monkeypatch.setattr(http_replies, "ODDITIES", (odd_server._status,))
    assert http_replies.run(1, 12).key_leaks > 0


def test_kinds_share_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"replies": Counts(tried=3, wrong=1, examples=["x"]), "files": Counts(tried=2, hangs=1)}
    monkeypatch.setattr(command, "load_kind", lambda name: lambda seed, count: found[name])
    out = tmp_path / "fuzz.json"
    for name in found:
        arguments = ["fuzz", "--kinds", name, "--out", str(out)]
        monkeypatch.setattr("sys.argv", arguments)
        monkeypatch.setattr(command, "command_line", lambda: "python -m x")
        monkeypatch.setattr("benchmarks.lib.common.command_line", lambda: "python -m x")
        with pytest.raises(SystemExit) as end:
            command.main()
        assert end.value.code == 1
    figures = json.loads(out.read_text())["figures"]
    assert (figures["replies"], figures["files"]) == (3, 2)
    assert (figures["wrong"], figures["hangs"], figures["tracebacks"]) == (1, 1, 0)


def test_every_kind_has_a_count_that_the_result_must_show() -> None:
    least = {"configs": 10_000, "replies": 20_000, "files": 2_000, "prompt_files": 10_000}
    least |= {"http_replies": 200, "model_dirs": 100, "vllm_replies": 20_000}
    assert {name: count for name, (_, count) in kinds.KINDS.items()} == least
