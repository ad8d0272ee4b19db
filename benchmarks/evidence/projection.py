"""Carries token counts of the lab to Qwen3-4B, with rates measured for the stages.

The rates are those of `benchmarks/results/h200_stages.json`, on one H200. Those of a stage that was
not measured are scaled from a measured one by the models' parameters, and are listed in `SCALED`.
"""

import json
from collections.abc import Mapping
from functools import cache

from benchmarks.lib.common import RESULTS

PAIRS = ("4b_from_8b", "4b_from_32b")
_BILLIONS = {"4b": 4.02, "8b": 8.19, "32b": 32.76}
SCALED = (
    "sampling with the 8B and 32B teacher: vLLM's rate with 4B, by parameters",
    "scoring with the 32B teacher: SGLang's rate with 8B in FP8, by parameters",
)


def projected_s(pair: str, tokens: Mapping[str, float]) -> float:
    """Seconds on one H200 that an arm's tokens would take, one stage after another.

    Args:
        tokens: by kind as in the cost ledger; prompts count in scoring and training, where the
            measured rates count them.
    """
    rates = stage_rates(pair)
    return (
        tokens.get("sampled_student", 0) / rates["sample_student"]
        + tokens.get("sampled_teacher", 0) / rates["sample_teacher"]
        + tokens.get("scored", 0) / rates["score"]
        + tokens.get("trained", 0) / rates["train"]
    )


@cache
def stage_rates(pair: str) -> Mapping[str, float]:
    """Tokens per second of each stage."""
    student, _, teacher = pair.partition("_from_")
    measured = json.loads((RESULTS / "h200_stages.json").read_text())["figures"]
    larger = _BILLIONS[teacher] / _BILLIONS[student]
    return {
        "sample_student": measured["vllm_tok_s"],
        "sample_teacher": measured["vllm_tok_s"] / larger,
        "score": measured["score_tok_s"] * _BILLIONS["8b"] / _BILLIONS[teacher],
        "train": measured["unsloth_tok_s"],
    }
