"""Shows a time plan as a table and in lines, and suggested settings as commands to type."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from qwen3_distill.config import RunConfig
from qwen3_distill.planning.suggest import Suggestion
from qwen3_distill.planning.time_plan import STAGES, Assumed, TimePlan
from qwen3_distill.recording.text import duration, gib, percent


def time_table(plan: TimePlan) -> Table:
    """Return each stage's seconds in a step, and what bounds it."""
    table = Table(title="Time of a step, predicted", title_justify="left")
    for column in ("stage", "seconds", "bound by", "which is"):
        table.add_column(column, justify="right" if column in ("seconds", "which is") else "left")
    for stage in STAGES:
        time = plan.stages[stage]
        if time.seconds <= 0:
            table.add_row(stage, "0.00", "nothing to do", "")
            continue
        share = time.parts[time.bound] / time.seconds
        table.add_row(stage, f"{time.seconds:.2f}", time.bound, percent(share))
    return table


def time_lines(config: RunConfig, plan: TimePlan, assumed: Assumed) -> Iterator[str]:
    """Say what the plan assumes, what a step and the run take, and what is left out."""
    answers = assumed.answers
    lengths = f"prompts of {assumed.prompt_tokens} tokens, answers of {answers.median_tokens}"
    if answers.tail > 1:
        lengths += f" in the median, {answers.tail:g} times that in the 99th percentile"
        lengths += f", at most {answers.max_tokens}"
    yield f"assumed: {lengths} (--prompt-tokens, --response-tokens, --tail)"
    yield f"rates of {plan.rates.name}; {plan.rates.origin}"
    if not plan.rates.calibrated:
        yield "`qwen3-distill calibrate` on the device itself replaces these by measured ones"
    how = "stages overlap" if config.pipeline.kind == "streaming" else "one stage after another"
    yield (
        f"a step: {duration(plan.step_s)} ({config.pipeline.kind}: {how}), "
        f"{plan.tokens_per_s:,.0f} new tokens/s"
    )
    hours = plan.run_s / 3600
    yield (
        f"the run: {config.steps} steps in {hours:.2f} hours, of them "
        f"{plan.evaluation_s / 3600:.2f} of evaluations; without starts and checkpoints"
    )
    if plan.money is None:
        yield "money: give a price, e.g. cost.price_per_device_hour=3.5"
    else:
        yield f"money: {plan.money:,.2f} {plan.currency} for {plan.devices} device(s)"
    for note in plan.notes:
        yield f"not counted: {note}"


def suggestion_lines(
    found: Sequence[Suggestion], now: TimePlan, *, fits: bool = True
) -> Iterator[str]:
    """Print the best settings, first those that leave the optimization as it is.

    Args:
        fits: whether the config of ``now`` does; else nothing is compared with it.
    """
    if fits:
        yield f"now: {now.tokens_per_s:,.0f} new tokens/s, a step of {duration(now.step_s)}"
    groups = (
        (False, "The same optimization, other settings of speed and memory:"),
        (True, "Another optimization: what each changes is named; results will differ:"),
    )
    for changes, title in groups:
        own = [each for each in found if bool(each.meaning) == changes]
        yield title
        if not own:
            yield f"  nothing {'faster' if fits else 'that fits and is faster'} was found"
        for each in own:
            gain = f" ({each.plan.tokens_per_s / now.tokens_per_s:.2f}x)" if fits else ""
            memory = (
                f"{gib(each.memory.required_bytes)} of {gib(each.memory.device.free_bytes)} GiB"
            )
            yield (
                f"  {each.plan.tokens_per_s:,.0f} new tokens/s{gain}, a step of "
                f"{duration(each.plan.step_s)}, {memory}, bound by {each.plan.bound}"
            )
            yield f"    {' '.join(each.overrides)}"
            for change in each.meaning:
                yield f"    changes: {change}"
