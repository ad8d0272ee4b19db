"""Compares the time plan with committed results: what fitted it, and what did not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.lib.time_plan_case import SAMPLED, TOP_16, Case, Row, read
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, FITTED_ON, Efficiency, peak_rates

FIXED = "fixed"
OF_OPD_STEP = {
    "sampling": "generate",
    "scoring": "score",
    "training": "train",
    "publishing": "publish",
}
"""The stages' names in `benchmarks.speed.stages`."""
_OF_RECORD = {
    "sampling": "time/generate_s",
    "scoring": "time/score_s",
    "training": "time/train_s",
    "publishing": "time/publish_s",
}


_STREAMING = "pipeline={kind: streaming, mps: true, max_staleness_steps: 8, max_steps_ahead: 3}"
_FP8_BACKWARD = "training.base_precision=fp8_backward"
_FP8_CACHE = (
    "generation.kv_cache_dtype=fp8",
    "generation.attention_backend=triton",
)
_MICRO_BATCH_10240 = "training.micro_batch_tokens=10240"
_XQA = ("generation.kv_cache_dtype=fp8", "generation.attention_backend=flashinfer")
_OLD_HOST = "answers are checked while the step goes on"
_OLD_CANDIDATES = "candidates' logprobs come from unsloth's fused kernel"
_OLD_SERVER = "SGLang selects candidates by blocks"
_ONCE = "h200_rows_once"
_INSIDE = (_ONCE, "h200_rows_inside")
_OLD_ATTENTION = "our attention is inside unsloth's compiled layers"
_OLD_SUMS = "a shared prompt's gradient is added up without atomics"


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
        *_start_rows(),
        *_one_start_rows("h200_one_start"),
        *_one_start_rows("h200_tails"),
        *_one_start_rows("h200_tails_packed", "training.packing=true", _FP8_BACKWARD, *_FP8_CACHE),
        *_one_start_rows("h200_levers", _FP8_BACKWARD, *_FP8_CACHE),
        *_one_start_rows("h200_levers_xqa", _FP8_BACKWARD, *_XQA),
        *_one_start_rows("h200_levers_n4", _FP8_BACKWARD, *_XQA),
        *_one_start_rows("h200_levers_priority", _FP8_BACKWARD, *_XQA),
        *_one_start_rows("h200_levers_micro", _FP8_BACKWARD, *_XQA, _MICRO_BATCH_10240),
        *_one_start_rows("h200_levers_beside", _FP8_BACKWARD, *_XQA),
        *_one_start_rows("h200_topk16"),
        *_one_start_rows("h200_shipped_streaming"),
        *_one_start_rows("h200_levers_without", parts=("n4",)),  # its note says why not the rest
        *_plan_rows("h200_tails"),
        *_learner_rows("h200_learners"),
        *_learner_rows("h200_rows"),
        *_learner_rows("h200_rows_divided"),
        *_learner_rows("h200_rows_inside"),
        *_learner_rows(_ONCE),
        *_learner_rows("h200_rows_5120", "training.micro_batch_tokens=5120"),
        *_learner_rows("h200_fp8_learners"),
        *_learner_rows("h200_fp8_learners_cudnn"),
    ]


_RATIO = " over "
RATIOS: Mapping[str, tuple[str, list[str]]] = {
    name: (source, parts.split(_RATIO))
    for name, row in FITTED_ON.items()
    if _RATIO in row
    for source, parts in [row.split(": ", 1)]
}
"""The shares that are a ratio of two learners' rates: the result, and its two parts."""
FITTED: Mapping[str, str] = {
    row: name
    for name, row in FITTED_ON.items()
    if row.startswith("h200_")
    and not row.startswith(("h200_decode_processes", "h200_shipped_streaming"))
    and name not in RATIOS
} | {f"{source}: {parts[0]}, training": name for name, (source, parts) in RATIOS.items()}
"""The shares by the row that fitted them; `decode_shares` computes four more, `candidate_share`
one."""


def _row(
    source: str, name: str, what: str, seconds: float, case: Case, changed: str | None = None
) -> Row:
    # A part that is one stage alone is named by itself.
    fits = FITTED.get(f"{source}: {name}, {what}") or FITTED.get(f"{source}: {name}")
    return Row(
        name=name,
        source=source,
        what=what,
        measured_s=seconds,
        case=case,
        fits=fits,
        changed=changed if fits is None else None,
    )


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


def _record_rows(
    source: str, name: str, record: Mapping[str, Any], case: Case, **changed: str | None
) -> Iterator[Row]:
    """Rows of a sequential step's record: its stages, and the whole step.

    A step with a stage that fitted is not held out.

    Args:
        changed: by stage, or ``step``, what was changed since.
    """
    rows = [
        _row(source, name, what, record[key], case, changed.get(what))
        for what, key in _OF_RECORD.items()
    ]
    seconds = record["time/step_s"] - record["time/checkpoint_s"]
    yield from rows
    if not any(row.fits for row in rows):
        yield _row(source, name, "step", seconds, case, changed.get("step"))


def _shipped_rows() -> Iterator[Row]:
    """Rows of a run of `configs/h200.yaml`; its prompts have 300 tokens and more."""
    for step in read("h200_shipped")["steps"][1:]:
        name, case = f"step {step['step']}", Case(prompt_tokens=300)
        host = step["time/step_s"] - sum(step[key] for key in _OF_RECORD.values())
        host -= step["time/checkpoint_s"]
        yield from _record_rows("h200_shipped", name, step, case, step=_OLD_HOST)
        yield _row("h200_shipped", name, "host", host, case, _OLD_HOST)


def _start_rows() -> Iterator[Row]:
    """Rows of `benchmarks.speed.start`: second steps of `configs/h200.yaml`.

    Its word problems have 285 tokens on average, a byte each.
    """
    for part, values in read("h200_start")["parts"].items():
        step, case, name = values["steps"][1], Case(prompt_tokens=285), f"{part} step 2"
        host_s = step["idle/all_fraction"] * step["time/step_s"]
        host = _row("h200_start", name, "host", host_s, case)
        *stages, whole = _record_rows("h200_start", name, step, case)
        yield from (*stages, host)
        if host.fits is None:
            yield whole
        else:
            seconds = whole.measured_s - host_s
            yield replace(whole, what="step without host", measured_s=seconds)


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
                yield from _record_rows(source, label, record, case)
            else:
                yield _row(source, label, "step", record["time/step_s"], case)


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


def _one_start_rows(
    source: str,
    *overrides: str,
    parts: Sequence[str] = ("fixed", "longtail8", "topk16", "topk16_streaming", "n4"),
) -> Iterator[Row]:
    """Rows of `benchmarks.speed.one_start`, with `configs/h200-streaming.yaml`."""
    found = read(source)["parts"]
    packing = "training.packing=true" in overrides
    changed = dict.fromkeys(("training", "step"), _OLD_ATTENTION if packing else None)
    for part, tail in (("fixed", 1.0), ("longtail8", 8.0)):
        if part not in parts or part not in found:
            continue
        lengths: dict[str, Any] = {"tail": tail}
        if tail > 1:
            lengths |= {"response_tokens": 128, "max_new_tokens": 2048}
        if "sequential" in found[part]:
            record, case = found[part]["sequential"], _one_start_case(*overrides, **lengths)
            yield from _record_rows(source, f"{part} sequential", record, case, **changed)
        seconds = found[part]["streaming"]["time/step_s"]
        case = _one_start_case(*overrides, _STREAMING, **lengths)
        yield _row(source, f"{part} streaming", "step", seconds, case, changed["step"])
    if "topk16" in parts and "topk16" in found:  # other rounds fitted what candidates cost
        record, case = found["topk16"]["topk16"], _one_start_case(*overrides, objective=TOP_16)
        old: dict[str, str | None] = {}
        if source in ("h200_topk16", "h200_one_start"):
            old |= {"scoring": _OLD_SERVER, "step": _OLD_SERVER}
        if source == "h200_one_start":
            old |= {"training": _OLD_CANDIDATES, "step": _OLD_CANDIDATES}
        yield from _record_rows(source, "top 16 sequential", record, case, **old)
        if "fixed" not in found:  # else it was measured twice
            record, case = found["topk16"]["sampled"], _one_start_case(*overrides)
            yield from _record_rows(source, "fixed sequential", record, case)
    # Scoring by itself in the same run fitted what candidates cost; the step did not.
    if "topk16_streaming" in parts and "topk16_streaming" in found:
        seconds = found["topk16_streaming"]["streaming"]["time/step_s"]
        case = _one_start_case(*overrides, _STREAMING, objective=TOP_16)
        yield _row(source, "top 16 streaming", "step", seconds, case)
    if "n4" in parts and "n4" in found:
        seconds = found["n4"]["streaming"]["time/step_s"]
        shared = ("training.shared_prompts=true", "samples_per_prompt=4", "prompts_per_step=64")
        case = _one_start_case(*overrides, _STREAMING, *shared)
        divided = source in ("h200_one_start", "h200_levers_without")
        reason = _OLD_ATTENTION if divided else None
        yield _row(source, "n4 streaming", "step", seconds, case, reason)


def _one_start_case(*overrides: str, **lengths: Any) -> Case:
    given = (
        "generation.max_sequences=512",
        "training.micro_batch_tokens=5120",
        "scoring.chunk_tokens=2048",
    )
    return Case(overrides=(*given, *overrides), **lengths)


def _plan_rows(source: str) -> Iterator[Row]:
    """Rows of the part `plan` of `benchmarks.speed.one_start`, which end with their stages."""
    for row in measured_rows(read(source)["parts"]["plan"]["measured"]):
        yield replace(row, source=source)


def measured_rows(parts: Mapping[str, Any], **changes: str) -> list[Row]:
    """Return the rows of measured settings: four stages and the step of each."""
    rows = []
    for name, part in parts.items():
        case, steps = Case(**(part["case"] | changes)), part["steps"]
        seconds = {
            what: sum(step[key] for step in steps) / len(steps) for what, key in OF_OPD_STEP.items()
        }
        seconds["step without host"] = sum(seconds.values())
        rows += [
            Row(name=name, source="measured", what=what, measured_s=value, case=case)
            for what, value in seconds.items()
        ]
    return rows


def _learner_rows(source: str, *overrides: str) -> Iterator[Row]:
    """Rows of `benchmarks.speed.learners`: 128 rollouts a step."""
    for part, values in read(source)["parts"].items():
        learner, _, work = part.rpartition("_") if part.endswith(("_n1", "_n4")) else (part, "", "")
        samples = 4 if work == "n4" else 1
        learner, _, lengths = learner.rpartition("_") if work else (learner, "", "128x512")
        seconds = _mean(values["steps_s"])
        case = _learner_case(learner, lengths, samples, *overrides)
        changed = None
        if "top16" in learner and source == "h200_learners" and "unsloth" in learner:
            changed = _OLD_CANDIDATES
        if "shared" in learner and source != _ONCE:
            changed = _OLD_SUMS
        if ("shared" in learner or "packed" in learner) and source not in _INSIDE:
            changed = _OLD_ATTENTION
        yield _row(source, part, "training", seconds, case, changed)


def shared_prompt_gains() -> dict[str, dict[str, float]]:
    """Compare what sharing prompts gains with what the number of tokens says."""
    rows, found = {row.name: row for row in _learner_rows(_ONCE)}, {}
    by_tokens = replace(EFFICIENCY, train_own_attention=1.0)
    for work in ("128x512_n4", "300x508_n4"):
        alone, shared = rows[f"unsloth_{work}"], rows[f"unsloth_shared_{work}"]
        found[work] = {
            "measured": round(alone.measured_s / shared.measured_s, 4),
            "by_tokens": round(alone.predicted_s() / shared.predicted_s(by_tokens), 4),
            "predicted": round(alone.predicted_s() / shared.predicted_s(), 4),
        }
    return found


def _learner_case(learner: str, lengths: str, samples: int, *given: str) -> Case:
    """Describe a learner and a work by their names in `benchmarks.speed.learners`."""
    prompt, _, answer = lengths.partition("x")
    overrides = [f"prompts_per_step={128 // samples}", f"samples_per_prompt={samples}", *given]
    if "unsloth" not in learner:
        embedded = "training={kind: embedded, dtype: bfloat16, micro_batch_tokens: 10240, "
        overrides.append(embedded + "tuning: {kind: lora}, compiled: true}")
    for name, override in (
        ("_shared", "training.shared_prompts=true"),
        ("_packed", "training.packing=true"),
        ("_fp8_backward", _FP8_BACKWARD),
    ):
        if name in learner:
            overrides.append(override)
    sizes: dict[str, Any] = {"response_tokens": 128, "max_new_tokens": 2048, "tail": 8.0}
    if answer.isdigit():
        sizes = {"response_tokens": int(answer), "max_new_tokens": int(answer)}
    objective = TOP_16 if "_top16" in learner else SAMPLED
    return Case(overrides=overrides, prompt_tokens=int(prompt), objective=objective, **sizes)


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
    """Compute what the top 16 cost for each token of a response: `h200_shipped_streaming`."""
    figures = read("h200_shipped_streaming")["figures"]
    tokens, responses = 256 * 640, 256 * 512
    with_top = tokens / figures["score_topk16_tok_s"]
    return {"candidates_s_per_token": (with_top - tokens / figures["score_tok_s"]) / responses}


def learner_shares(share: Efficiency) -> dict[str, float]:
    """Compute the shares that are ratios: the measured one over that of the plan without it."""
    found = {}
    for name, (source, parts) in RATIOS.items():
        measured, planned = [], []
        for part in parts:
            row = next(row for row in _learner_rows(source) if row.name == part)
            measured.append(row.measured_s)
            planned.append(row.predicted_s(replace(share, **{name: 1.0})))
        found[name] = planned[0] / planned[1] * measured[1] / measured[0]
    return found


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
    fitted = {row.fits: row for row in rows if row.fits in _ORDER}
    for name in _ORDER:
        row = fitted[name]

        def excess(
            value: float, name: str = name, row: Row = row, rest: Efficiency = share
        ) -> float:
            return row.error(_with(rest, name, value))

        value = _root(excess, getattr(share, name))
        share = _with(share, name, value)
    return replace(share, **learner_shares(share))


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
