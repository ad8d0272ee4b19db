"""The two configs for GB10s say the same where they are the same, and pages say what they say."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qwen3_distill.config.load import dump_config, load_config
from qwen3_distill.modeling.shapes import named_shape
from qwen3_distill.planning.cards import plan_cards
from qwen3_distill.planning.device_speed import Speed, slow_parts
from qwen3_distill.planning.machines import MACHINES
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.recording.text import gib

ROOT = Path(__file__).parents[3]
ONE, TWO = (ROOT / "configs" / name for name in ("gb10.yaml", "gb10-pair.yaml"))
PAGE = (ROOT / "docs/start/dgx-spark.md").read_text()


def settings(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from settings(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def texts(file: Path) -> dict[str, str]:
    """The line of every key that is written, with the comment lines right above it."""
    lines = file.read_text().splitlines()
    found: dict[str, str] = {}

    def walk(node: yaml.Node, above: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            first = last = key.start_mark.line
            while first > 0 and lines[first - 1].lstrip().startswith("#"):
                first -= 1
            found[f"{above}{key.value}"] = "\n".join(lines[first : last + 1])
            walk(value, f"{above}{key.value}.")

    root = yaml.compose(file.read_text())
    assert root is not None
    walk(root, "")
    return found


def explained(key: str, text: dict[str, str]) -> bool:
    """Whether the line of a key, or of a section around it, says what gb10.yaml has."""
    parts = key.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any("gb10.yaml" in text.get(name, "") for name in around)


def test_pair_has_the_settings_of_the_single_machine_or_says_why_not() -> None:
    one, two = (dict(settings(dump_config(load_config(file, [])))) for file in (ONE, TWO))
    written = texts(TWO)
    differing = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
    assert "generation.max_sequences" in differing
    assert [key for key in differing if not explained(key, written)] == []


def test_what_both_configs_set_alike_has_the_same_comments() -> None:
    one, two = texts(ONE), texts(TWO)
    shared = [key for key in one if key in two and key != "output_dir"]  # below the heads
    assert len(shared) > 40
    assert [key for key in shared if one[key] != two[key] and not explained(key, two)] == []


def test_head_of_the_pair_is_its_plan() -> None:
    shapes: dict[str, Any] = {
        "student_shape": named_shape("4B"),
        "teacher_shape": named_shape("32B"),
    }
    cards = plan_cards(load_config(TWO, []), device=MACHINES["gb10"].device, **shapes)
    first, second = (card.plan for card in cards)
    head = " ".join(line.removeprefix("# ") for line in TWO.read_text().splitlines()[:12])
    for words in (
        f"on the first student {gib(first.engine_bytes('student'))}, learner "
        f"{gib(first.engine_bytes('learner'))}, left free {gib(first.reserve_bytes)}; "
        f"{gib(first.required_bytes)} of {gib(first.device.free_bytes)}.",
        f"On the second teacher {gib(second.engine_bytes('teacher'))}, left free "
        f"{gib(second.reserve_bytes)}; {gib(second.required_bytes)} of",
    ):
        assert words in head
    assert any("0 of 36 layers recomputed" in row.how for row in first.rows)


def test_page_says_what_the_config_and_the_check_say() -> None:
    (required, available) = re.findall(r"([\d.]+) of ([\d.]+)\. The learner", ONE.read_text())[0]
    assert f"the plan needs {required} of {float(available):g} GiB, 14 of them left free" in PAGE
    slow = slow_parts(
        Speed(copy_gbs=1, bf16_tflops=80, clock_mhz=1, highest_mhz=3003), named_device("gb10")
    )
    least = [re.findall(r"expected ([\d,]+) or more", line)[0] for line in slow]
    assert f"less than {least[0]} GB/s or the clock under load is below {least[1]} MHz" in PAGE
    for line in re.findall(r"^\| `([^`]+)`", PAGE.partition("## Why the config")[2], re.M):
        key, _, value = line.partition(": ")
        if value and key not in ("dtype", "quantization", "adapters", "pipeline", "reserve_gib"):
            assert f"{key}: {value.partition(',')[0]}" in ONE.read_text(), line
