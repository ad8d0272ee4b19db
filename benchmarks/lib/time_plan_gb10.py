"""Predicts times of `configs/gb10.yaml`, and public training on a GB10: nothing measured here."""

from collections.abc import Sequence

from benchmarks.lib.time_plan_case import CONFIG
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, peak_rates
from qwen3_distill.planning.time_plan import Planned, TimePlan, assumed_lengths, plan_time

_TEACHERS = ("32B", "8B")


def gb10_predictions() -> dict[str, dict[str, float]]:
    """Predict a step of `configs/gb10.yaml` with other numbers of rollouts.

    Prompts of 110 tokens, answers of 280 in the median, 1.5 times that in the 99th percentile.
    """
    found = {}
    for rollouts, teacher in ((64, "32B"), (128, "32B"), (256, "32B"), (128, "8B")):
        number = [f"prompts_per_step={rollouts}", f"generation.max_sequences={rollouts}"]
        plan = _plan([*number, "evaluation=null"], teacher)
        sampled = plan.new_tokens / plan.stages["sampling"].seconds
        found[f"{rollouts} rollouts, {teacher} teacher"] = {
            **{stage: round(time.seconds, 2) for stage, time in plan.stages.items()},
            "step_s": round(plan.step_s, 1),
            "new_tok_s": round(plan.tokens_per_s, 1),
            "sampled_tok_s": round(sampled, 1),
            "hours_of_100_steps": round(plan.run_s / 3600, 2),
        }
    return found


def gb10_head_costs() -> dict[str, float]:
    """Predict what the teacher's float32 head adds to its scoring on a GB10, in percent.

    With TF32 off, and with it on as the config has it.
    """
    found = {}
    for name, tf32 in (("float32", "false"), ("tf32", "true")):
        arguments = f"scoring.server_arguments={{enable-tf32-matmul: {tf32}}}"
        for teacher in _TEACHERS:
            with_head, without = (
                _plan([f"scoring.float32_head={head}", arguments], teacher).stages["scoring"]
                for head in ("true", "false")
            )
            more = with_head.seconds / without.seconds - 1
            found[f"gb10_predicted_{name}_head_{teacher.lower()}_pct"] = 100 * more
    return found


def _plan(overrides: Sequence[str], teacher: str) -> TimePlan:
    config = load_config(CONFIG.with_name("gb10.yaml"), overrides)
    planned = Planned(
        config=config,
        student=named_shape("4B"),
        teacher=named_shape(teacher),
        recomputed_layers=0,
    )
    lengths = assumed_lengths(config, prompt_tokens=110, response_tokens=280, tail=1.5)
    return plan_time(planned, peak_rates(named_device("gb10")), lengths)


def gb10_training() -> dict[str, object]:
    """Predict the one public rate of training on a GB10; it does not count.

    Of the model only its number of parameters is known, so attention and the head are left out:
    forward, forward again, and backward without gradients of weights are 6 operations for each.
    """
    parameters, measured_tok_s = 9e9, 849.0
    rates = peak_rates(named_device("gb10"))
    predicted = EFFICIENCY.train * rates.bf16_flops / (6 * parameters)
    return {
        "row": "unsloth, 9B, LoRA rank 16, sequences of 512 tokens, everything recomputed",
        "source": "unslothai/unsloth pull request 10280, comment of its authors, 2026-09-08",
        "measured_tok_s": measured_tok_s,
        "predicted_tok_s": round(predicted, 1),
        "error_pct": round(100 * (predicted / measured_tok_s - 1), 1),
        "held_out": False,
        "why": "its clock was held at 1,690 MHz, and the model is known by its parameters only",
    }
