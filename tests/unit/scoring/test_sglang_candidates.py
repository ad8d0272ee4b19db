"""Candidates that SGLang gives as arrays: the same as its lists, and which arrays are faults."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from qwen3_distill.scoring.sglang.wire import Fault, FaultKind, read_scores, score_body
from qwen3_distill.types import TopKScore
from tests.sglang_stand_in import candidates_as_arrays
from tests.unit.scoring.test_sglang_wire import JOB, SAMPLED, TOP, TOP_2, VOCAB, entry, read, reply

SHAPE, EMPTY = "input_top_logprobs_shape", "input_top_logprobs_null_prefix"
VALUES, IDS = "input_top_logprobs_val_flat_b64", "input_top_logprobs_idx_flat_b64"


def test_arrays_are_asked_for_where_candidates_are() -> None:
    body = json.loads(score_body([JOB], TOP_2))
    assert body["return_flat_raw_top_logprobs"] is True
    assert body["return_flat_raw_top_logprobs_b64"] is True  # SGLang refuses it without the other
    assert "return_flat_raw_top_logprobs" not in json.loads(score_body([JOB], SAMPLED))


def test_arrays_give_what_lists_give() -> None:
    (from_lists,) = read(reply(entry(top=TOP)), TOP_2)
    (from_arrays,) = read(reply(entry(**candidates_as_arrays(TOP))), TOP_2)
    assert isinstance(from_lists, TopKScore)
    assert isinstance(from_arrays, TopKScore)
    for name in ("logprobs", "candidate_ids", "candidate_logprobs"):
        one, other = getattr(from_lists, name), getattr(from_arrays, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def encoded(values: list[Any], dtype: str) -> str:
    return base64.b64encode(np.array(values, dtype=dtype).tobytes()).decode()


FLAT_IDS = [4, 2, 7, 1, 0, 9]
FLAT_VALUES = [-0.5, -1.0, -0.25, -1.5, -0.75, -1.25]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({SHAPE: [2, 2]}, FaultKind.LENGTH),
        ({SHAPE: [4, 2]}, FaultKind.LENGTH),
        ({SHAPE: [2, 3]}, FaultKind.LENGTH),
        ({SHAPE: [3, 1]}, FaultKind.CANDIDATES),
        ({SHAPE: [3, 2, 1]}, FaultKind.GARBAGE),
        ({SHAPE: [3.0, 2]}, FaultKind.GARBAGE),
        ({SHAPE: [3, True]}, FaultKind.GARBAGE),
        ({SHAPE: None}, FaultKind.GARBAGE),
        ({SHAPE: [-1, -2], EMPTY: 5}, FaultKind.GARBAGE),
        ({EMPTY: 0, SHAPE: [4, 2]}, FaultKind.MISALIGNED),
        ({EMPTY: 2, SHAPE: [2, 2]}, FaultKind.MISSING),
        ({EMPTY: 2}, FaultKind.LENGTH),
        ({EMPTY: "1"}, FaultKind.GARBAGE),
        ({f"{VALUES}_dtype": "float64"}, FaultKind.GARBAGE),
        ({f"{IDS}_dtype": "int64"}, FaultKind.GARBAGE),
        ({VALUES: 3}, FaultKind.GARBAGE),
        ({VALUES: "*" * 32}, FaultKind.GARBAGE),
        ({VALUES: "é" * 32}, FaultKind.GARBAGE),
        ({VALUES: encoded(FLAT_VALUES, "<f4")[:-1]}, FaultKind.GARBAGE),
        ({VALUES: encoded(FLAT_VALUES[:-1], "<f4")}, FaultKind.LENGTH),
        ({VALUES: encoded(FLAT_VALUES, "<f8")}, FaultKind.LENGTH),
        ({IDS: encoded([*FLAT_IDS, 3], "<i4")}, FaultKind.LENGTH),
        ({VALUES: encoded([*FLAT_VALUES[:-1], np.nan], "<f4")}, FaultKind.MISSING),
        ({VALUES: encoded([*FLAT_VALUES[:-1], -np.inf], "<f4")}, FaultKind.MISSING),
        ({VALUES: encoded([0.5, *FLAT_VALUES[1:]], "<f4")}, FaultKind.POSITIVE),
        ({IDS: encoded([VOCAB, *FLAT_IDS[1:]], "<i4")}, FaultKind.CANDIDATES),
        ({IDS: encoded([-1, *FLAT_IDS[1:]], "<i4")}, FaultKind.CANDIDATES),
        ({IDS: encoded([4, 4, *FLAT_IDS[2:]], "<i4")}, FaultKind.CANDIDATES),
        ({VALUES: encoded([-0.5, -0.1, *FLAT_VALUES[2:]], "<f4")}, FaultKind.CANDIDATES),
        ({IDS: encoded([3, 2, *FLAT_IDS[2:]], "<i4")}, FaultKind.MISALIGNED),  # not the token sent
        ({VALUES: encoded(FLAT_VALUES, ">f4")}, FaultKind.CANDIDATES),
    ],
)
def test_bad_arrays_are_a_fault(changes: dict[str, Any], kind: FaultKind) -> None:
    arrays = candidates_as_arrays(TOP)
    assert arrays[VALUES] == encoded(FLAT_VALUES, "<f4")
    assert arrays[IDS] == encoded(FLAT_IDS, "<i4")
    (outcome,) = read(reply(entry(**(arrays | changes))), TOP_2)
    assert isinstance(outcome, Fault), outcome
    assert outcome.kind is kind, outcome


@pytest.mark.parametrize("name", [EMPTY, VALUES, IDS, f"{VALUES}_dtype", f"{IDS}_dtype"])
def test_a_part_that_is_missing_is_a_fault(name: str) -> None:
    arrays = candidates_as_arrays(TOP)
    del arrays[name]
    (outcome,) = read(reply(entry(**arrays)), TOP_2)
    assert isinstance(outcome, Fault)
    assert outcome.kind is FaultKind.GARBAGE
    assert name in outcome.detail


def test_one_bad_sequence_does_not_spoil_the_others() -> None:
    good = entry(**candidates_as_arrays(TOP))
    bad = entry(**(candidates_as_arrays(TOP) | {VALUES: ""}))
    outcomes = read_scores(
        reply(good, bad, good), [JOB] * 3, TOP_2, vocab_size=VOCAB, teacher_id="t"
    )
    assert [isinstance(one, TopKScore) for one in outcomes] == [True, False, True]
