"""The charts of a run: learning, responses and health."""

from collections.abc import Iterable
from statistics import median

from qwen3_distill.recording import text
from qwen3_distill.report.charts import (
    Figure,
    Level,
    Line,
    LineChart,
    draw_lines,
)
from qwen3_distill.report.drawing import Colour
from qwen3_distill.report.run_files import RunFiles


def _drawn(charts: Iterable[LineChart]) -> list[Figure]:
    """The charts that have a point to draw."""
    return [figure for chart in charts if (figure := draw_lines(chart)) is not None]


def _metric_line(run: RunFiles, key: str, name: str, colour: Colour = "c1") -> Line:
    points = run.points(key)
    window = min(25, 2 * round(len(points) / 30) + 1)
    return Line(name=name, points=points, colour=colour, smooth=window)


def learning_figures(run: RunFiles) -> list[Figure]:
    """Accuracy, reverse KL, entropy, solved rollouts and advantage over steps."""
    kl = LineChart(
        title="Reverse KL",
        lines=[_metric_line(run, "loss/reverse_kl_nats", "KL(student ‖ teacher), nats per token")],
        note="Estimated on the sampled tokens, so single steps may lie below zero.",
    )
    entropy = LineChart(
        title="Student entropy",
        lines=[_metric_line(run, "loss/entropy_nats", "nats per token", "c3")],
        note="A fall toward zero means that the student answers ever more alike.",
    )
    solved = LineChart(
        title="Training rollouts solved",
        lines=[_metric_line(run, "rollout/accuracy", "share of rollouts", "c4")],
        y_format="percent",
        y_ceiling=1.0,
        note="On training prompts, as sampled; the held-out accuracy is the measure.",
    )
    advantage = LineChart(
        title="Size of the advantage",
        lines=[_metric_line(run, "loss/advantage_abs_nats", "mean |A|, nats", "c5")],
        note="How much the teacher has to say about a token, on average.",
    )
    return _drawn([_accuracy_chart(run), kl, entropy, solved, advantage])


def _accuracy_chart(run: RunFiles) -> LineChart:
    student = run.student_evaluations
    teacher = run.evaluation("teacher")
    measured = Line(
        name="student, 95% interval",
        points=[(e["step"], e["accuracy"]) for e in student],
        band=[(e["step"], e["ci_low"], e["ci_high"]) for e in student],
        markers=True,
    )
    levels = []
    if teacher is not None:
        low, high = teacher["ci_low"], teacher["ci_high"]
        name = "teacher, 95% interval"
        levels = [Level(name=name, value=teacher["accuracy"], colour="c2", low=low, high=high)]
    counts = sorted({e["num_problems"] for e in student})
    problems = " to ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    return LineChart(
        title="Held-out accuracy",
        lines=[measured],
        levels=levels,
        y_format="percent",
        y_floor=None,
        y_ceiling=1.0,
        wide=True,
        note=f"Over {problems} problems." if problems else "",
    )


def response_figures(run: RunFiles) -> list[Figure]:
    """Length of the responses, and the share that was cut off, over steps."""
    return _drawn(
        [
            LineChart(
                title="Response length",
                lines=[_metric_line(run, "rollout/response_tokens", "mean tokens")],
            ),
            LineChart(
                title="Truncated responses",
                lines=[_metric_line(run, "rollout/truncated_fraction", "share of rollouts", "c6")],
                y_format="percent",
                y_ceiling=1.0,
                note="Cut at the token limit before the student ended its answer.",
            ),
        ]
    )


def health_figures(run: RunFiles) -> list[Figure]:
    """Numerical gap, importance ratio, gradient norm, weight lag and context over steps."""
    engine = LineChart(
        title="Learner against engine",
        lines=[_metric_line(run, "health/learner_vs_engine_abs_nats", "mean |gap|, nats", "c4")],
        note="Log-probabilities of the same tokens under the same weights: rounding, if all is "
        "well.",
    )
    ratio = LineChart(
        title="Largest importance ratio",
        lines=[
            Line(
                name="maximum over tokens",
                points=run.points("health/ratio_max"),
                colour="c5",
                reduce="max",
            )
        ],
        y_floor=None,
        note="Learner over sampler, before the cap. Near 1 while sampling is on-policy.",
    )
    gradient = LineChart(
        title="Gradient norm", lines=[_metric_line(run, "optim/grad_norm", "before clipping", "c6")]
    )
    lag = LineChart(
        title="Weight lag",
        lines=[
            Line(name="steps", points=run.points("weights/lag_steps"), colour="c7", reduce="max")
        ],
        note="Age of the oldest token that a step trained on.",
    )
    context = LineChart(
        title="The teacher with and without its context",
        lines=[
            Line(name="with, mean nats", points=run.points("context/with_nats"), colour="c2"),
            Line(name="without", points=run.points("context/without_nats"), colour="c6"),
        ],
        y_floor=None,
        note="The teacher's log-probability of the student's tokens, on a few rollouts. What lies "
        "between the lines is what the context tells it.",
    )
    return _drawn([engine, ratio, gradient, lag, context])


_HEALTH_ROWS = (
    ("health/learner_vs_engine_abs_nats", "learner against engine, nats"),
    ("health/ratio_max", "largest importance ratio"),
    ("health/ratio_capped_fraction", "tokens with a capped ratio"),
    ("health/advantage_clipped_fraction", "tokens with a clipped advantage"),
    ("loss/advantage_abs_nats", "mean size of the advantage, nats"),
    ("optim/grad_norm", "gradient norm"),
    ("weights/lag_steps", "weight lag, steps"),
    ("context/abs_difference_nats", "teacher with against without its context, nats"),
)


def health_table(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """(name, median, maximum, last) of every health number that the run recorded."""
    rows = []
    for key, name in _HEALTH_ROWS:
        if values := run.values(key):
            show = text.percent if key.endswith("_fraction") else text.number
            rows.append((name, show(median(values)), show(max(values)), show(values[-1])))
    return rows
