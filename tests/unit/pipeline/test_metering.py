"""The meter leaves out what a teacher did not compute, once, whoever says so."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwen3_distill.config import CostConfig, FullTuning, SampledReverseKL
from qwen3_distill.modeling.flops import causal_pairs, forward_flops
from qwen3_distill.modeling.shapes import ModelShape, named_shape
from qwen3_distill.pipeline.metering import CostModel, Meter
from qwen3_distill.ports import CACHED_TOKENS, STORED_TOKENS
from qwen3_distill.recording.cost_ledger import CostLedger
from qwen3_distill.scoring.sglang.wire import read_scores
from qwen3_distill.types import SampledRequest, ScoreFailure, ScoringJob, TeacherScore, TokenSpan

SHAPE = named_shape("0.6B")
JOB = ScoringJob(rollout_id="r0", token_ids=np.arange(10), scored=(TokenSpan(start=4, stop=10),))
SCORE = TeacherScore(teacher_id="t", logprobs=-np.ones(6, dtype=np.float32))
WHOLE = forward_flops(SHAPE, tokens=10, pairs=causal_pairs(10), head_tokens=6)


@pytest.fixture
def ledger(tmp_path: Path) -> CostLedger:
    opened = CostLedger(tmp_path / "cost.jsonl", CostConfig(), began=0.0, unknown={})
    opened.begin(0, dict)
    return opened


def meter_of(ledger: CostLedger, teacher: ModelShape | None = SHAPE) -> Meter:
    model = CostModel(
        student=SHAPE,
        teachers={None: None if teacher is None else (teacher,)},
        tuning=FullTuning(kind="full"),
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        published_bytes=8,
        unknown={},
    )
    return Meter(model, ledger)


def kept(ledger: CostLedger) -> dict[str, float]:
    ledger.end_step(1, ())
    return ledger.totals.kept


def test_kept_scores_cost_no_flops(ledger: CostLedger) -> None:
    meter = meter_of(ledger)
    meter.scored([JOB, JOB], [SCORE, SCORE], {STORED_TOKENS: 10.0})
    meter.scored([JOB], [SCORE], {STORED_TOKENS: 20.0})
    found = kept(ledger)
    assert found["flops/score"] == WHOLE
    assert found["tokens/scored"] == 30
    assert found["tokens/score_stored"] == 20


def test_cached_tokens_cost_no_linear_layers_also_after_a_restart(ledger: CostLedger) -> None:
    meter = meter_of(ledger)
    meter.scored([JOB], [SCORE], {CACHED_TOKENS: 3.0})
    meter.scored([JOB], [SCORE], {CACHED_TOKENS: 2.0})  # the counter began anew
    found = kept(ledger)
    assert found["tokens/score_cached"] == 5
    assert found["flops/score"] == 2 * WHOLE - 2 * SHAPE.linear_parameters * 5


def test_a_job_without_a_score_was_computed_and_sent_nothing(ledger: CostLedger) -> None:
    meter_of(ledger).scored([JOB], [ScoreFailure(rollout_id="r0", reason="aborted")], {})
    found = kept(ledger)
    assert found["flops/score"] == WHOLE
    assert "bytes/scores" not in found


def test_flops_of_an_unknown_shape_are_left_out_and_tokens_are_not(ledger: CostLedger) -> None:
    meter_of(ledger, teacher=None).scored([JOB], [SCORE], {CACHED_TOKENS: 3.0})
    found = kept(ledger)
    assert "flops/score" not in found
    assert found["tokens/scored"] == 10


def test_a_server_s_answer_says_what_was_cached() -> None:
    rows = [[None, 3, None], *([-0.5, token, None] for token in range(4, 10))]
    meta = {"input_token_logprobs": rows, "cached_tokens": 3}
    told: list[int] = []
    for entry in ({"meta_info": meta}, {"meta_info": {"input_token_logprobs": rows}}):
        (score,) = read_scores(
            json.dumps([entry]).encode(),
            [JOB],
            SampledRequest(),
            vocab_size=100,
            teacher_id="t",
            on_cached=told.append,
        )
        assert isinstance(score, TeacherScore)
    assert told == [3, 0]
