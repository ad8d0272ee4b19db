"""``qwen3-distill plan`` and ``calibrate``: memory and time of a run, before it starts."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen3_distill.cli.terminal import ConfigOption, Overrides, print_json, say, warn
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.errors import ConfigError
from qwen3_distill.recording.terminal import TerminalConsole

if TYPE_CHECKING:
    from qwen3_distill.modeling.shapes import ModelShape
    from qwen3_distill.planning.device import DeviceMemory
    from qwen3_distill.planning.plan import MemoryPlan
    from qwen3_distill.planning.rates import Rates
    from qwen3_distill.planning.suggest import Situation
    from qwen3_distill.planning.time_plan import Assumed, TimePlan


def _refuse_nan(value: float | None) -> float | None:
    """Refuse NaN, which passes an option's range because no comparison with it holds."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number")
    return value


_Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Plan for this device: its time by its data sheet, and whether CPU and GPU share its "
        "memory; e.g. h200, h100-sxm or gb10. Default: the one here, as `calibrate` measured it, "
        "else by its data sheet.",
    ),
]
_PromptTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a prompt; default: planning.prompt_tokens.")
]
_ResponseTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Median tokens of an answer; default: sampling.max_new_tokens."),
]
_Tail = Annotated[
    float,
    typer.Option(
        min=1,
        max=1000,
        callback=_refuse_nan,
        help="99th percentile of the answers' lengths over their median; 1: all alike.",
    ),
]
_Suggest = Annotated[
    bool, typer.Option("--suggest", help="Search settings for the most tokens/s within memory.")
]


def plan(
    config: ConfigOption,
    overrides: Overrides = None,
    shape_student: Annotated[
        str | None, typer.Option(help="Plan with this Qwen3, e.g. 4B, instead of the directory.")
    ] = None,
    shape_teacher: Annotated[
        str | None, typer.Option(help="The same for the teacher, e.g. 32B or 32B-FP8.")
    ] = None,
    device_memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1_000_000,
            callback=_refuse_nan,
            help="Memory to plan for; default: what is free here now.",
        ),
    ] = None,
    device: _Device = None,
    prompt_tokens: _PromptTokens = None,
    response_tokens: _ResponseTokens = None,
    tail: _Tail = 1.0,
    suggest: _Suggest = False,
) -> None:
    """Show how the engines share the memory, and how long steps and run will take.

    Exit status 2, with advice, if the memory does not suffice. Times are predictions
    (docs/guide/time-plan.md).
    """
    settings = load_config(config, overrides or ())
    from qwen3_distill.modeling.shapes import named_shape
    from qwen3_distill.pipeline.models import localize
    from qwen3_distill.planning.peaks import named_device
    from qwen3_distill.planning.plan import planned_device
    from qwen3_distill.planning.suggest import refuse_without_cards
    from qwen3_distill.planning.time_plan import assumed_lengths

    assumed = assumed_lengths(
        settings, prompt_tokens=prompt_tokens, response_tokens=response_tokens, tail=tail
    )
    if suggest:
        refuse_without_cards(settings)
    predicts = _predicts_time(settings, required=suggest)
    rates = _rates(device, required=suggest) if predicts else None
    shapes = {"student": shape_student, "teacher": shape_teacher}
    read = [role for role, shape in shapes.items() if shape is None]
    settings = localize(settings, say=say, warn=warn, roles=read, datasets=False).config
    student = None if shape_student is None else named_shape(shape_student)
    teacher = None if shape_teacher is None else named_shape(shape_teacher)
    memory = planned_device(
        settings,
        None if device_memory_gib is None else int(device_memory_gib * 2**30),
        unified=None if device is None else named_device(device).unified,
    )
    if not suggest:
        card = _show_memory(settings, memory, student, teacher)
        if rates is not None:
            _show_time(_situation(settings, card.device, rates, assumed, student, teacher), card)
    elif rates is not None:
        _show_suggestions(_situation(settings, memory, rates, assumed, student, teacher))


def _predicts_time(settings: RunConfig, *, required: bool) -> bool:
    """Return whether the time can be predicted: with several teachers it is not, which is noted.

    Raises:
        ConfigError: it cannot, and it is required.
    """
    if len(settings.loaded_teachers) < 2:
        return True
    what = "the time is predicted for one teacher only, and this config has several"
    if required:
        raise ConfigError(f"{what}; plan without --suggest, or with one of them as `scoring`")
    warn(what)
    return False


def _rates(device: str | None, *, required: bool) -> "Rates | None":
    """Return the device's rates; a device here of which nothing is known is a note.

    Raises:
        ConfigError: a device was named that is not known, or the rates are required.
    """
    from qwen3_distill.planning.device_rates import UnknownDevice, rates_here, rates_of

    if device is not None:
        return rates_of(device)
    try:
        return rates_here()
    except UnknownDevice as error:
        if required:
            raise
        warn(str(error))
        return None


def _situation(
    settings: RunConfig,
    device: "DeviceMemory",
    rates: "Rates",
    assumed: "Assumed",
    student: "ModelShape | None",
    teacher: "ModelShape | None",
) -> "Situation":
    """Describe the run on its device; models without a named shape are read."""
    from qwen3_distill.modeling.shapes import read_shape
    from qwen3_distill.planning.suggest import Situation

    scoring = settings.loaded_teacher
    if scoring is not None and teacher is None:
        teacher = read_shape(scoring.model)
    return Situation(
        config=settings,
        student=student or read_shape(settings.student.model),
        teacher=None if scoring is None else teacher,
        device=device,
        rates=rates,
        assumed=assumed,
    )


def _show_memory(
    settings: RunConfig,
    device: "DeviceMemory",
    student: "ModelShape | None",
    teacher: "ModelShape | None",
) -> "MemoryPlan":
    """Print the memory plan of every kind of card; return that of the learner's.

    Raises:
        ConfigError: it does not fit.
    """
    from qwen3_distill.planning.cards import plan_cards, plan_of
    from qwen3_distill.planning.table import plan_settings, plan_table

    cards = plan_cards(settings, device=device, student_shape=student, teacher_shape=teacher)
    for card in cards:
        title = card.what if settings.cluster is not None else None
        TerminalConsole().print(plan_table(card.plan, title))
    if settings.cluster is None:
        say(f"planned settings: {plan_settings(settings, cards[0].plan)}")
    return plan_of("learner", cards)


def _show_time(situation: "Situation", laid_out: "MemoryPlan") -> "TimePlan":
    """Print the time plan of the config itself, and return it."""
    from qwen3_distill.planning.suggest import evaluated
    from qwen3_distill.planning.time_table import time_lines, time_table

    found = evaluated(situation, laid_out)
    TerminalConsole().print(time_table(found))
    for line in time_lines(situation.config, found, situation.assumed):
        say(line)
    return found


def _show_suggestions(situation: "Situation") -> None:
    """Print both plans, and the settings found. A config that does not fit is said to.

    Raises:
        ConfigError: neither the config nor anything that was tried fits.
        typer.Exit: the config does not fit, and something else does.
    """
    from qwen3_distill.planning.cards import lay_out_cards, plan_of
    from qwen3_distill.planning.suggest import suggest
    from qwen3_distill.planning.time_table import suggestion_lines

    shapes = situation.student, situation.teacher
    refusal: ConfigError | None = None
    try:
        laid_out = _show_memory(situation.config, situation.device, *shapes)
    except ConfigError as error:
        refusal = error
        cards = lay_out_cards(
            situation.config,
            device=situation.device,
            student_shape=situation.student,
            teacher_shape=situation.teacher,
        )
        laid_out = plan_of("learner", cards)
    found = suggest(situation)
    if refusal is not None:
        if not found:
            raise ConfigError(f"{refusal}\n--suggest found nothing that fits, either") from None
        warn(f"the config as it is does not fit: {refusal}")
        say("The config as it is, if it fitted:")
    now = _show_time(situation, laid_out)
    for line in suggestion_lines(found, now, fits=refusal is None):
        say(line)
    if refusal is not None:
        raise typer.Exit(refusal.exit_code)


def calibrate(
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        typer.Option(help="auto: the first GPU, or the CPU of a machine without one."),
    ] = "auto",
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1, max=3600, callback=_refuse_nan, help="About how long to measure in all."
        ),
    ] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON only.")] = False,
) -> None:
    """Measure this device in a minute, for `plan`: products, memory, launches.

    Writes a small file into the user's cache, which `plan` then uses. Run nothing else meanwhile.
    Ctrl-C writes nothing.
    """
    from qwen3_distill.planning.calibrate import calibrate as measure
    from qwen3_distill.planning.calibrate import choose_device
    from qwen3_distill.planning.calibration import save_calibration
    from qwen3_distill.utils.signals import signals_as_ctrl_c

    def tell(line: str) -> None:
        if not json:
            say(line)

    try:
        with signals_as_ctrl_c():
            measured = measure(choose_device(device), seconds, tell)
    except KeyboardInterrupt:
        warn("stopped; nothing was written")
        raise typer.Exit(130) from None
    except MemoryError:
        raise ConfigError("the memory does not suffice; end what else runs here") from None
    file = save_calibration(measured)
    if json:
        print_json(asdict(measured))
    tell(f"written to {file}; `qwen3-distill plan` uses it on this machine")
