"""Compares the time plan with committed results: what fitted it, and what did not."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, FITTED_ON, Efficiency, peak_rates
from qwen3_distill.planning.time_plan import Planned, TimePlan, assumed_lengths, plan_time

CONFIG = Path(__file__).parents[2] / "configs" / "h200.yaml"
FIXED = "fixed"
_OF_RECORD = {
    "sampling": "time/generate_s",
    "scoring": "time/score_s",
    "training": "time/train_s",
    "publishing": "time/publish_s",
}


@cache
def _config(overrides: tuple[str, ...]) -> RunConfig:
    return load_config(CONFIG, overrides)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Work that was measured: the config's changes, lengths, models and the card."""

    overrides: Sequence[str] = ()
    prompt_tokens: int = 128
    response_tokens: int = 512
    tail: float = 1.0
    max_new_tokens: int = 512
    teacher: str = "8B"
    student: str = "4B"
    recomputed_layers: int = 0
    device: str = "h200"

    def config(self) -> RunConfig:
        """Return the run that was measured; the results are of the sampled token's objective."""
        given = (
            f"sampling.max_new_tokens={self.max_new_tokens}",
            "evaluation=null",
            "objective={kind: sampled_reverse_kl}",
        )
        return _config((*given, *self.overrides))

    def plan(self, share: Efficiency = EFFICIENCY) -> TimePlan:
        """Predict it."""
        config = self.config()
        planned = Planned(
            config=config,
            student=named_shape(self.student),
            teacher=named_shape(self.teacher),
            recomputed_layers=self.recomputed_layers,
        )
        assumed = assumed_lengths(
            config,
            prompt_tokens=self.prompt_tokens,
            response_tokens=self.response_tokens,
            tail=self.tail,
        )
        return plan_time(planned, peak_rates(named_device(self.device)), assumed, share)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured time beside its prediction."""

    name: str
    source: str
    """The result's file, without its ending."""
    what: str
    """A stage, or ``step``."""
    measured_s: float
    case: Case
    fits: str | None = None
    """The share that it fitted; None: it was held out."""

    def predicted_s(self, share: Efficiency = EFFICIENCY) -> float:
        """Return the plan's seconds."""
        plan = self.case.plan(share)
        if self.what == "step":
            return plan.step_s
        if self.what == "step without host":  # the benchmark's steps end with their stages
            return plan.step_s - plan.stages["host"].seconds
        return plan.stages[self.what].seconds  # type: ignore[index]

    def error(self, share: Efficiency = EFFICIENCY) -> float:
        """Return (predicted - measured) / measured."""
        return self.predicted_s(share) / self.measured_s - 1

    def as_record(self) -> dict[str, Any]:
        """Return the row for a result file."""
        record = {
            "row": self.name,
            "source": self.source,
            "what": self.what,
            "measured_s": round(self.measured_s, 4),
            "predicted_s": round(self.predicted_s(), 4),
            "error_pct": round(100 * self.error(), 1),
        }
        return record if self.fits is None else record | {"fitted": self.fits}


def gb10_predictions() -> dict[str, dict[str, float]]:
    """Predict a step of `configs/gb10.yaml` with other numbers of rollouts: nothing measured.

    Prompts of 110 tokens, answers of 280 in the median, 1.5 times that in the 99th percentile.
    """
    found = {}
    for rollouts, teacher in ((64, "32B"), (128, "32B"), (256, "32B"), (128, "8B")):
        number = [f"prompts_per_step={rollouts}", f"generation.max_sequences={rollouts}"]
        config = load_config(CONFIG.with_name("gb10.yaml"), [*number, "evaluation=null"])
        planned = Planned(
            config=config,
            student=named_shape("4B"),
            teacher=named_shape(teacher),
            recomputed_layers=0,
        )
        lengths = assumed_lengths(config, prompt_tokens=110, response_tokens=280, tail=1.5)
        plan = plan_time(planned, peak_rates(named_device("gb10")), lengths)
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
    """Predict what the teacher's float32 head adds to its scoring on a GB10, in percent."""
    found = {}
    for teacher in ("32B", "8B"):
        scored = []
        for head in ("true", "false"):
            config = load_config(CONFIG.with_name("gb10.yaml"), [f"scoring.float32_head={head}"])
            planned = Planned(
                config=config,
                student=named_shape("4B"),
                teacher=named_shape(teacher),
                recomputed_layers=0,
            )
            lengths = assumed_lengths(config, prompt_tokens=110, response_tokens=280, tail=1.5)
            plan = plan_time(planned, peak_rates(named_device("gb10")), lengths)
            scored.append(plan.stages["scoring"].seconds)
        found[f"gb10_predicted_float32_head_{teacher.lower()}_pct"] = 100 * (
            scored[0] / scored[1] - 1
        )
    return found


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a committed result."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def committed_rows() -> list[Row]:
    """Return every row of the committed H200 results, fitted ones too."""
    return [
        *_stage_rows("h200_stages", micro_batch=10240),
        *_stage_rows("h200_stages_micro_batch_5120", micro_batch=5120),
        *_shipped_rows(),
        *_overlap_rows("h200_overlap", 5120),
        *_overlap_rows("h200_overlap_equal_priority", 5120),
        *_overlap_rows("h200_overlap_again", 5120),
        *_overlap_rows("h200_overlap_micro_batch_8192", 8192),
        *_overlap_rows("h200_overlap_micro_batch_10240", 10240),
        *_learner_rows(),
    ]


FITTED: Mapping[str, str] = {
    row: name
    for name, row in FITTED_ON.items()
    if row.startswith("h200_") and not row.startswith(("h200_decode_processes", "h200_one_start"))
}
"""The shares by the row that fitted them; `decode_shares` computes four more, `candidate_share`
one."""


def _row(source: str, name: str, what: str, seconds: float, case: Case) -> Row:
    # A part that is one stage alone is named by itself.
    fits = FITTED.get(f"{source}: {name}, {what}") or FITTED.get(f"{source}: {name}")
    return Row(name=name, source=source, what=what, measured_s=seconds, case=case, fits=fits)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stage_rows(source: str, *, micro_batch: int) -> Iterator[Row]:
    """Rows of `benchmarks.speed.stages`: stages by themselves, and steps of the loop."""
    parts = read(source)["parts"]
    case = Case(overrides=[f"training.micro_batch_tokens={micro_batch}"])
    tokens = 256 * (128 + 512)
    yield _row(source, "score", "scoring", tokens / parts["score"]["score_tok_s"], case)
    off = parts["train_off"]
    yield _row(source, "train_off", "training", tokens / off["unsloth_tok_s"], case)
    every = Case(overrides=["training.micro_batch_tokens=20480"], recomputed_layers=36)
    rate = parts["train_ckpt"]["unsloth_ckpt_tok_s"]
    yield _row(source, "train_ckpt, all layers recomputed", "training", tokens / rate, every)
    steps = parts["opd"]["steps"]
    keys = {"sampling": "generate", "scoring": "score", "training": "train"}
    for what, key in (keys | {"publishing": "publish"}).items():
        yield _row(source, "opd", what, _mean([step[key] for step in steps]), case)
    whole = [sum(step[key] for key in (*keys.values(), "publish")) for step in steps]
    if micro_batch == 10240:  # the other one fitted two of its stages
        yield _row(source, "opd", "step without host", _mean(whole), case)
    large = Case(teacher="32B-FP8", overrides=["scoring.quantization=null"])
    seconds = parts["resident"]["first_step_s"]["score"]
    yield _row(source, "32B FP8 teacher", "scoring", seconds, large)


def _shipped_rows() -> Iterator[Row]:
    """Rows of a run of `configs/h200.yaml`; its prompts have 300 tokens and more."""
    for step in read("h200_shipped")["steps"][1:]:
        name = f"step {step['step']}"
        case = Case(prompt_tokens=300)
        stages = 0.0
        for what, key in _OF_RECORD.items():
            stages += step[key]
            yield _row("h200_shipped", name, what, step[key], case)
        host = step["time/step_s"] - stages - step["time/checkpoint_s"]
        yield _row("h200_shipped", name, "host", host, case)


def _overlap_rows(source: str, micro_batch: int) -> Iterator[Row]:
    """Rows of `benchmarks.speed.overlap`: sequential and streaming, three kinds of lengths."""
    for part, values in read(source)["parts"].items():
        name = part.split("-")[0].removesuffix("_without_mps")
        if "streaming" not in values or "pause" in part:
            continue
        mps = "without_mps" not in part
        for kind in ("sequential", "streaming"):
            record = values.get(kind)
            if record is None:
                continue
            case = _overlap_case(name, kind, micro_batch, mps=mps)
            label = f"{name} {kind}" + ("" if mps else " without MPS")
            if kind == "sequential":
                for what, key in _OF_RECORD.items():
                    yield _row(source, label, what, record[key], case)
            what = "step" if kind == "streaming" else "step without host"
            if any(each.startswith(f"{source}: {label}, ") for each in FITTED) and what != "step":
                continue  # it contains stages that fitted
            yield _row(source, label, what, record["time/step_s"], case)


def _overlap_case(name: str, kind: str, micro_batch: int, *, mps: bool) -> Case:
    tail = 1.0 if name == FIXED else float(name.removeprefix("longtail"))
    pipeline = f"pipeline={{kind: {kind}, mps: {str(mps).lower()}}}"
    return Case(
        overrides=[
            f"training.micro_batch_tokens={micro_batch}",
            "generation.max_sequences=512",
            pipeline,
        ],
        response_tokens=512 if name == FIXED else 256,
        tail=tail,
        max_new_tokens=512 if name == FIXED else 4096,
    )


def _learner_rows() -> Iterator[Row]:
    """Rows of `benchmarks.speed.learners`: 128 rollouts of 128 + 512 tokens a step."""
    source = "h200_learners"
    embedded = "training={kind: embedded, dtype: bfloat16, micro_batch_tokens: 10240, "
    embedded += "tuning: {kind: lora}, compiled: true}"
    for part, values in read(source)["parts"].items():
        seconds = _mean(values["steps_s"])
        rollouts = round(seconds * values[f"train_{part}_tok_s"] / (128 + 512))
        overrides = [f"prompts_per_step={rollouts}"]
        if "unsloth" not in part:
            overrides.append(embedded)
        yield _row(source, part, "training", seconds, Case(overrides=overrides))


def decode_shares() -> dict[str, float]:
    """Compute the shares of a decode step from its profile: h200_decode_processes, two processes.

    256 sequences in the middle of a round of 128 + 512 tokens, so 384 cached tokens each.
    """
    profile = read("h200_decode_processes")["engines"]["mp"]["profile"]["category_ms"]
    shape, rates = named_shape("4B"), peak_rates(named_device("h200"))
    head = shape.vocab_size * shape.hidden_size
    weights_s = 2 * (shape.linear_parameters + head) / rates.bandwidth
    products_s = 2 * (shape.linear_parameters + head) * 256 / rates.bf16_flops
    least = (weights_s**2 + products_s**2) ** 0.5
    cache_s = 256 * 384 * shape.kv_bytes_per_token(2) / rates.bandwidth
    row_s = 4 * 256 * shape.vocab_size / rates.bandwidth
    kernels = profile["norms, rotary, activation"] / 1e3 / shape.num_layers
    return {
        "decode_products": least / (profile["matrix products"] / 1e3),
        "kv_reads": cache_s / (profile["attention"] / 1e3),
        "logits_passes": profile["sampling"] / 1e3 / row_s,
        "decode_kernels_per_layer": kernels / rates.graph_kernel_s,
    }


def candidate_share() -> dict[str, float]:
    """Compute what the teacher's top 16 cost for each token of a response: `h200_one_start`."""
    figures = read("h200_one_start")["figures"]
    tokens, responses = 256 * 640, 256 * 512
    with_top = tokens / figures["score_topk16_tok_s"]
    return {"candidates_s_per_token": (with_top - tokens / figures["score_tok_s"]) / responses}


_ORDER = (
    "decode_step_s",
    "train",
    "score_fp8",
    "score_fp8_blocks",
    "train_masked_attention",
    "publish_passes",
    "host_s_per_rollout",
    "streaming_mps",
    "streaming_slices",
)
"""Rows of later ones contain earlier ones."""


def fit(rows: Sequence[Row]) -> Efficiency:
    """Fit every share on its row: the value with which the row is predicted exactly."""
    share = replace(EFFICIENCY, **decode_shares(), **candidate_share())
    fitted = {row.fits: row for row in rows if row.fits is not None}
    for name in _ORDER:
        row = fitted[name]

        def excess(
            value: float, name: str = name, row: Row = row, rest: Efficiency = share
        ) -> float:
            return row.error(_with(rest, name, value))

        value = _root(excess, getattr(share, name))
        share = _with(share, name, value)
    return share


def _with(share: Efficiency, name: str, value: float) -> Efficiency:
    changes = {name: value} | ({"prefill": value} if name == "train" else {})
    return replace(share, **changes)


def _root(excess: Callable[[float], float], start: float) -> float:
    """Find where a monotone function is zero, between a hundredth and a hundred times ``start``."""
    low, high = start / 100, start * 100
    rises = excess(high) > excess(low)
    for _ in range(80):
        middle = (low * high) ** 0.5
        if (excess(middle) > 0) == rises:
            high = middle
        else:
            low = middle
    return (low * high) ** 0.5
