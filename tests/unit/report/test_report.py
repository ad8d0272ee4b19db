import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_distill.errors import AlignmentError, DataError, RunFolderError
from qwen3_distill.report import charts
from qwen3_distill.report.charts import (
    Level,
    Line,
    LineChart,
    StackedChart,
    draw_lines,
    draw_stack,
    running_mean,
)
from qwen3_distill.report.drawing import ticks
from qwen3_distill.report.report import RolloutView, write_report
from qwen3_distill.report.rollout_view import (
    GAP_EDGES_NATS,
    ROLLOUTS_PER_STEP,
    TOKENS_PER_ROLLOUT,
    gap_class,
    visible,
)

VOID = {"meta", "link", "br", "hr", "img", "input", "line", "circle", "path"}


class _Page(HTMLParser):
    """Checks nesting while it collects what the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str]] = []
        """(css, text) of every rollout token."""
        self.loads: list[str] = []
        self._token: str | None = None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self.loads += [f"{tag} {key}" for key in values if key in {"src", "href", "srcset"}]
        if tag not in VOID:
            self.open.append(tag)
        css = (values.get("class") or "").split()
        self._token = css[1] if tag == "span" and css[:1] == ["t"] and "title" in values else None
        if self._token:
            self.tokens.append((self._token, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._token = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._token:
            self.tokens[-1] = (self._token, self.tokens[-1][1] + data)

    @property
    def shown(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))

    def section(self, name: str) -> bool:
        return any(tag == "section" and values.get("id") == name for tag, values in self.tags)


def _step(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "wall_s": 0.7 * step,
        "loss/reverse_kl_nats": 1 / step,
        "loss/entropy_nats": 0.5,
        "loss/advantage_abs_nats": 0.2,
        "optim/grad_norm": 1.0,
        "rollout/response_tokens": 30.0,
        "rollout/truncated_fraction": 0.02,
        "rollout/accuracy": None if step == 2 else 0.6,
        "health/learner_vs_engine_abs_nats": 2e-6,
        "health/ratio_max": 1.0002,
        "health/ratio_capped_fraction": 0.0,
        "weights/lag_steps": 0,
        "time/generate_s": 0.3,
        "time/score_s": 0.1,
        "time/train_s": 0.2,
        "time/publish_s": 0.01,
        "tokens/generated": 1000,
    }


def _evaluation(step: int, accuracy: float, model: str = "student", n: int = 500) -> dict[str, Any]:
    return {
        "step": step,
        "model": model,
        "accuracy": accuracy,
        "ci_low": accuracy - 0.04,
        "ci_high": accuracy + 0.03,
        "num_problems": n,
        "samples_per_problem": 1,
        "mean_tokens": 30.5,
        "truncated_fraction": 0.012,
        "wall_s": 9.0,
    }


def _accuracy(value: float) -> dict[str, float]:
    return {"value": value, "ci_low": value - 0.04, "ci_high": value + 0.03}


def _cost_lines() -> list[dict[str, Any]]:
    """The cost ledger of 40 equal steps."""
    empty: dict[str, Any] = {"work": {}, "evaluation": {}, "unused": {}}
    price = {"price_per_device_hour": None, "currency": "USD"}
    start = {"step": 0, "kind": "start", **empty, "devices": 1, "unknown": {}, **price}
    work = {"tokens/trained": 2_000, "flops/train": 10**12, "device_s/train": 1.5}
    steps = [{**empty, "step": n, "kind": "step", "work": work} for n in range(1, 41)]
    return [start, *steps]


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


PROMPT = {
    "prompt_id": "train:0",
    "pieces": [["<|im_start|>", 151644], ["user\n2+2=", None], ["<|im_end|>", 151645]],
    "facts": [["tokens", "9"], ["thinking", "off: it ends with an empty <think> block"]],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    config = {
        "steps": 40,
        "seed": 3,
        "student": {"model": "models/small"},
        "scoring": {"kind": "embedded", "model": "models/large"},
        "objective": {"kind": "sampled_reverse_kl"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {"git": {"revision": "abc123"}, "versions": {"torch": "2.0"}, "extras": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "prompt.json").write_text(json.dumps(PROMPT))
    _write_lines(folder / "metrics.jsonl", [_step(step) for step in range(1, 41)])
    evaluations = [
        _evaluation(0, 0.93, "teacher"),
        _evaluation(0, 0.48),
        _evaluation(20, 0.70, n=100),
        _evaluation(40, 0.79, n=100),
        _evaluation(40, 0.81),
    ]
    _write_lines(folder / "evaluations.jsonl", evaluations)
    _write_lines(folder / "cost.jsonl", _cost_lines())
    summary = {
        "accuracy": {
            "before": _accuracy(0.48),
            "after": _accuracy(0.81),
            "teacher": _accuracy(0.93),
        },
        "steps": 40,
        "tokens": {"generated": 40_000, "scored": 40_000, "trained": 40_000},
        "wall_s": {"generate": 12.0, "score": 4.0, "train": 8.0, "evaluate": 20.0, "total": 50.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _rollout(step: int = 10, name: str = "r0", **changes: Any) -> RolloutView:
    fields: dict[str, Any] = {
        "step": step,
        "rollout_id": name,
        "prompt_text": "2+2=",
        "tokens": ("4", ";", "<|im_end|>"),
        "behavior_logprobs": (-0.1, -0.2, -3.0),
        "teacher_logprobs": (-5.0, -0.21, -0.1),
        "finish_reason": "stop",
        "correct": True,
    }
    return RolloutView(**{**fields, **changes})


def _page(folder: Path, rollouts: list[RolloutView] | None = None) -> _Page:
    return _Page(write_report(folder, rollouts or []).read_text(encoding="utf-8"))


SECTIONS = (
    "result",
    "learning",
    "responses",
    "prompt",
    "rollouts",
    "time",
    "cost",
    "health",
    "setup",
)


def test_a_whole_run_shows_every_section(run):
    page = _page(run, [_rollout(10), _rollout(40)])
    assert all(page.section(name) for name in SECTIONS)
    for text in (
        "my-run",
        "student small teacher large objective sampled_reverse_kl seed 3",
        "finished, 40 steps",
        "rose by 33.0 points, 73% of its distance to the teacher",
        "44.0 to 51.0%",
        "Held-out accuracy",
        "Over 100 to 500 problems.",
        "Reverse KL",
        "Student entropy",
        "Training rollouts solved",
        "Response length",
        "Truncated responses",
        "Seconds per step",
        "Whole run",
        "Learner against engine",
        "Largest importance ratio",
        "1.0002",
        "Weight lag",
        "Gradient norm",
        "Held-out accuracy against cost",
        "40 T",
        '"model": "models/small"',
        "Prompt train:0 as the chat template renders it",
        "<|im_start|> user 2+2= <|im_end|>",
        "thinking off: it ends with an empty <think> block",
        "git.revision abc123",
        "versions.torch 2.0",
        "Step 10 (early)",
        "Step 40 (late)",
        "40.0 k tokens generated",
    ):
        assert text in page.shown, text
    assert "missing" not in {values.get("class") for _, values in page.tags}


def test_the_page_loads_nothing(run):
    page_path = write_report(run, [_rollout()])
    html = page_path.read_text(encoding="utf-8")
    assert not re.search(r"https?://", html)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", html)
    assert _Page(html).loads == []


def test_the_crosshair_finds_its_data(run):
    charts_data = [
        json.loads(v["data-chart"] or "") for _, v in _page(run).tags if "data-chart" in v
    ]
    assert len(charts_data) == 13
    accuracy = charts_data[0]
    assert len(accuracy["px"]) == len(accuracy["at"]) == 3
    # At step 40 the evaluation of more problems counts.
    expected = ["c1", "student, 95% interval", "81.0% (77.0% to 84.0%)"]
    assert accuracy["at"][-1] == ["step 40", [expected]]


def test_everything_hostile_is_escaped(run):
    evil = "</pre></span><script>alert(1)</script>\"&'"
    hostile = _rollout(
        name=evil,
        prompt_text=evil,
        finish_reason=evil,
        tokens=(evil, "\n<b>", "\x00\x1b\u202e\x9b"),
    )
    pieces = [[evil, 1], [f"{evil}\x00\x1b\u202e", None]]
    (run / "prompt.json").write_text(json.dumps(PROMPT | {"prompt_id": evil, "pieces": pieces}))
    config = json.loads((run / "config.json").read_text())
    config["student"]["model"] = "x/<img src=x onerror=alert(1)>"
    (run / "config.json").write_text(json.dumps(config))
    (run / "manifest.json").write_text(json.dumps({evil: evil}))
    html = write_report(run, [hostile]).read_text(encoding="utf-8")
    page = _Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 1  # the page's own
    assert "img" not in {tag for tag, _ in page.tags}
    assert [text for _, text in page.tokens] == [evil, "↵<b>", "␀␛\\u{202e}\\u{9b}"]
    assert not set(html) & {"\x00", "\x1b", "\x9b", "\u202e"}
    assert page.shown.count("<script>alert(1)</script>") >= 5


def test_invisible_characters_are_made_visible():
    assert visible("a\nb\tc\r") == "a↵b⇥c␍"
    assert visible("\x00") == "␀"
    assert visible("\u202e\ud800\x7f") == "\\u{202e}\\u{d800}\\u{7f}"
    assert visible("") == "∅"
    assert visible(" é日本👍🏽") == " é日本👍🏽"


def test_half_a_surrogate_pair_in_the_config_does_not_stop_the_report(run):
    (run / "config.json").write_text('{"seed": "\\ud800"}')
    assert "\\ud800" in _page(run).shown


def test_the_colour_follows_the_sign_and_size_of_the_gap(run):
    page = _page(run, [_rollout()])
    assert page.tokens == [("n5", "4"), ("z", ";"), ("p4", "<|im_end|>")]
    assert gap_class(-0.0) == gap_class(0.0) == "z"
    for level, edge in enumerate(GAP_EDGES_NATS, 1):
        assert gap_class(edge) == f"p{level}"
        assert gap_class(-edge) == f"n{level}"
    titles = [v["title"] for t, v in page.tags if t == "span" and "title" in v]
    assert titles[0] == "“4”\nstudent −0.10\nteacher −5.00\ngap −4.90 nats"  # noqa: RUF001


def test_line_breaks_in_tokens_break_the_line(run):
    html = write_report(run, [_rollout(tokens=("a", "\n\n", "b"))]).read_text(encoding="utf-8")
    assert "↵↵</span>\n\n<span" in html


def test_verdict_finish_reason_and_prompt_are_shown(run):
    page = _page(
        run,
        [
            _rollout(name="r0", prompt_text="what is\n2+2?"),
            _rollout(name="r1", correct=False, finish_reason="length"),
            _rollout(name="r2", correct=None),
        ],
    )
    for text in ("✓ correct", "✗ wrong", "not checked", "finish: length", "what is 2+2?", "r2"):
        assert text in page.shown
    assert "1 of 2 correct" in page.shown  # the third was not checked


def test_rewards_between_0_and_1_are_shown_as_numbers(run):
    page = _page(run, [_rollout(name="r0", correct=0.25), _rollout(name="r1", correct=True)])
    for text in ("reward 0.25", "✓ correct", "mean reward 0.62"):
        assert text in page.shown
    assert "of 2 correct" not in page.shown


def test_what_is_not_shown_of_the_rollouts_is_counted(run):
    long = TOKENS_PER_ROLLOUT + 7
    zeros = (-0.5,) * long
    rollouts = [_rollout(name=f"r{i}") for i in range(ROLLOUTS_PER_STEP + 2)]
    rollouts[0] = _rollout(tokens=("x",) * long, behavior_logprobs=zeros, teacher_logprobs=zeros)
    page = _page(run, rollouts)
    assert "7 more tokens are not shown" in page.shown
    assert f"over {ROLLOUTS_PER_STEP + 2} saved rollouts; the first" in page.shown
    assert sum(tag == "article" for tag, _ in page.tags) == ROLLOUTS_PER_STEP


def test_early_middle_and_late_steps_in_order(run):
    page = _page(run, [_rollout(step) for step in (50, 10, 30, 20, 40)])
    labels = re.findall(r"Step (\d+) \((\w+)\)", page.shown)
    assert labels == [("10", "early"), ("30", "middle"), ("50", "late")]


def test_numpy_logprobs_are_fine(run):
    page = _page(
        run,
        [
            _rollout(
                behavior_logprobs=np.array([-0.1, -0.2, -3.0], np.float32),
                teacher_logprobs=np.array([-5.0, -0.21, -0.1], np.float32),
            )
        ],
    )
    assert [css for css, _ in page.tokens] == ["n5", "z", "p4"]


def test_a_rollout_of_unequal_lengths_cannot_be_built():
    with pytest.raises(AlignmentError, match="3 tokens, 2 behavior"):
        _rollout(behavior_logprobs=(-0.1, -0.2))


def test_an_empty_folder_says_what_is_missing(tmp_path):
    page = _page(tmp_path)
    assert all(page.section(name) for name in SECTIONS)
    for text in (
        "not finished: no step was recorded",
        "No accuracy",
        "No learning curves",
        "No response statistics",
        "No sample rollouts",
        "No times",
        "No health numbers",
        "No config",
        "No manifest",
    ):
        assert text in page.shown


def test_a_run_cut_short_shows_what_it_has(run):
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:25]) + lines[25][:40])  # torn
    _write_lines(run / "evaluations.jsonl", [_evaluation(0, 0.48), _evaluation(20, 0.70)])
    page = _page(run)
    for text in (
        "not finished: 25 of 40 steps recorded",
        "student at step 20",
        "rose by 22.0 points.",
        "teacher not measured",
        "Steps recorded so far",
        "25.0 k tokens generated",
    ):
        assert text in page.shown, text


def test_steps_without_evaluations(run):
    (run / "summary.json").unlink()
    (run / "evaluations.jsonl").unlink()
    page = _page(run)
    assert "No accuracy curve" in page.shown
    assert "Reverse KL" in page.shown


def test_overlapping_intervals_are_called_chance(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["accuracy"]["after"] = _accuracy(0.47)
    (run / "summary.json").write_text(json.dumps(summary))
    shown = _page(run).shown
    assert "fell by 1.0 points; the two intervals overlap, so this may be chance" in shown


def test_the_table_knows_the_rest_of_the_evaluation_behind_the_summary(run):
    page = _page(run)
    assert "student after 81.0% 77.0 to 84.0% 500 30.5 1.2%" in page.shown


def _second(step: int, accuracy: float, model: str = "student") -> dict[str, Any]:
    return _evaluation(step, accuracy, f"{model}@0") | {"temperature": 0.0}


@pytest.mark.parametrize(("after", "is_sharper_only"), [(0.61, True), (0.80, False)])
def test_a_second_temperature_tells_sharpening_from_learning(run, after, is_sharper_only):
    plain = _page(run).shown
    with (run / "evaluations.jsonl").open("a") as log:
        for record in (_second(0, 0.60), _second(40, after), _second(0, 0.95, "teacher")):
            log.write(json.dumps(record) + "\n")
    shown = _page(run).shown
    assert "greedy" not in plain
    assert "student after 81.0% 77.0 to 84.0% 500 30.5 1.2%" in shown
    assert "student before, greedy 60.0%" in shown
    assert "teacher, greedy 95.0%" in shown
    assert f"With greedy answers it rose by {100 * (after - 0.6):.1f} points." in shown
    assert ("may have sharpened" in shown) is is_sharper_only


def test_report_goes_where_it_is_told(run, tmp_path):
    out = tmp_path / "elsewhere.html"
    assert write_report(run, [], out) == out
    assert out.exists()
    assert not (run / "report.html").exists()


def test_errors_are_named(tmp_path, run):
    with pytest.raises(RunFolderError, match="no such directory"):
        write_report(tmp_path / "nowhere", [])
    with pytest.raises(RunFolderError):
        write_report(run, [], tmp_path / "nowhere" / "report.html")
    (run / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json"):
        write_report(run, [])


@pytest.mark.parametrize(
    "content",
    ["{}", '{"prompt_id": 1, "pieces": [1], "facts": []}', "[]", '{"pieces'],
)
def test_a_damaged_prompt_is_named(run, content):
    (run / "prompt.json").write_text(content)
    with pytest.raises(DataError, match=r"prompt\.json"):
        write_report(run, [])


def test_a_run_from_before_prompts_were_kept_says_so(run):
    (run / "prompt.json").unlink()
    assert "No prompt: prompt.json is not in the run folder" in _page(run).shown


def test_long_runs_stay_drawable(run):
    _write_lines(run / "metrics.jsonl", [_step(step) for step in range(1, 3001)])
    page = _page(run)
    assert f"Drawn as means of {charts.MAX_POINTS} equal groups of steps" in page.shown
    assert "running mean over 25 groups" in page.shown


def _coordinates(svg: str, css: str) -> list[tuple[float, float]]:
    path = re.search(rf'class="{css}" d="M([^"Z]*)', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path[1])]


def test_a_higher_value_is_drawn_higher_and_a_later_step_further_right():
    figure = draw_lines(
        LineChart(title="t", lines=[Line(name="a", points=[(1, 0.0), (5, 1.0), (9, 0.5)])])
    )
    assert figure is not None
    (x1, y1), (x2, y2), (x3, y3) = _coordinates(figure.svg, "line c1")
    assert x1 < x2 < x3
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 > y3 > y2  # SVG counts downwards
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.2)


def test_the_maximum_of_a_group_is_not_averaged_away():
    points = [(float(i), 100.0 if i == 777 else 1.0) for i in range(5000)]
    figure = draw_lines(LineChart(title="t", lines=[Line(name="a", points=points, reduce="max")]))
    assert figure is not None
    assert "&#34;100&#34;" in figure.svg  # the crosshair's text
    assert "maxima" in figure.note


def test_levels_and_bands_are_inside_the_plot():
    figure = draw_lines(
        LineChart(
            title="t",
            lines=[
                Line(name="a", points=[(0, 0.5), (9, 0.6)], band=[(0, 0.4, 0.6), (9, 0.5, 0.7)])
            ],
            levels=[Level(name="b", value=0.9, colour="c2", low=0.8, high=0.95)],
            y_floor=None,
            y_ceiling=1.0,
        )
    )
    assert figure is not None
    ys = [y for css in ("line c1", "band c1", "band c2") for _, y in _coordinates(figure.svg, css)]
    assert min(ys) > charts._TOP
    assert [name for _, name in figure.legend] == ["a", "b"]


def test_stacked_parts_add_up():
    figure = draw_stack(
        StackedChart(
            title="t", names=["a", "b"], colours=["c1", "c2"], x=[1, 2], values=[[1, 1], [1, 3]]
        )
    )
    assert figure is not None
    lower, upper = (_coordinates(figure.svg, f"stack {c}") for c in ("c1", "c2"))
    assert upper[2:] == list(reversed(lower[:2]))  # b starts where a ends
    base, top_a, top_b = lower[-1][1], lower[0][1], upper[0][1]
    assert base - top_a == pytest.approx(top_a - top_b, abs=0.2)


def test_nothing_to_draw_is_none():
    assert draw_lines(LineChart(title="t", lines=[Line(name="a", points=[])])) is None
    empty = StackedChart(title="t", names=["a"], colours=["c1"], x=[], values=[[]])
    assert draw_stack(empty) is None


@pytest.mark.parametrize(
    "points", [[(3.0, 0.0)], [(3.0, -1.0), (4.0, -2.0)], [(1.0, 5e8), (2.0, 1e-9)]]
)
def test_odd_ranges_can_be_drawn(points):
    for floor in (0.0, None):
        figure = draw_lines(
            LineChart(title="t", lines=[Line(name="a", points=points)], y_floor=floor)
        )
        assert figure is not None
        assert "nan" not in figure.svg


def test_ticks_are_round_and_running_means_are_means():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(1, 3, 8, whole=True) == [1, 2, 3]
    assert ticks(1, 21, 8, whole=True) == [5, 10, 15, 20]  # not every 2.5
    points = [(float(x), float(y)) for x, y in enumerate([0, 3, 6, 9])]
    assert [y for _, y in running_mean(points, 3)] == [1.5, 3.0, 6.0, 7.5]
