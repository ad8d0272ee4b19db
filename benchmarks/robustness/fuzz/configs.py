"""Kind ``configs``: YAML texts and overrides, mutated, read by `load_config`.

What is read must be what the text says: a config that is accepted is dumped, read again and equal,
and has no number that is not finite.
"""

import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz.counts import Counts, Progress
from benchmarks.robustness.fuzz.odd_values import ODD_TEXTS, mutated_bytes, odd_value
from benchmarks.robustness.fuzz.watch import over_time, raised
from qwen3_distill.config.load import check_config, dump_config, load_config
from qwen3_distill.errors import DistillError

_LIMIT_S = 10.0
_MAX_MESSAGE = 16_000
_CONFIGS = Path(__file__).parents[3] / "configs"
_TAGS = ("!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!binary", "!!set", "!!omap")
_YAML = (
    "a: !!int\n",
    '"\\UFFFFFFFF"\n',
    "[" * 5000,
    "{a: " * 3000,
    "- " * 2000,
    "a: &a [*a]\n",
    "seed: &a {b: *a}\n",
    "<<: {seed: 1}\n",
    "? [1]\n: 2\n",
    "\x00",
    "%YAML 9.9\n---\n",
    "--- a\n--- b\n",
    "seed: 0x_\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 1e400\n",
    "\ufeffseed: 1\n",
    "&a " * 500,
)


def run(seed: int, count: int) -> Counts:
    """Try ``count`` configs."""
    counts, progress = Counts(), Progress("configs", count)
    texts = [path.read_text(encoding="utf-8") for path in sorted(_CONFIGS.glob("*.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fuzz.yaml"
        for content, overrides in _inputs(random.Random(seed), texts, count):
            _try(file, content, overrides, counts)
            progress.show(counts)
    return counts


def _inputs(rng: random.Random, texts: list[str], count: int) -> Iterator[tuple[bytes, list[str]]]:
    for _ in range(count):
        text = rng.choice(texts)
        overrides: list[str] = []
        match rng.randrange(6):
            case 0:
                content = mutated_bytes(rng, text.encode())
            case 1:
                content = _with_odd_line(rng, text).encode("utf-8", "surrogatepass")
            case 2:
                content = (rng.choice(_YAML) + rng.choice(["", text])).encode()
            case 3:
                content = _bomb(rng).encode()
            case _:
                content = text.encode()
                overrides = [_override(rng, text) for _ in range(rng.randint(1, 3))]
        yield content, overrides


def _with_odd_line(rng: random.Random, text: str) -> str:
    """Replace the value of some lines."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        number = rng.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        if colon:
            value = rng.choice([_odd_yaml(rng), f"{rng.choice(_TAGS)} {_odd_yaml(rng)}"])
            lines[number] = f"{key}: {value}"
    return "\n".join(lines)


def _odd_yaml(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(ODD_TEXTS)
    return json.dumps(odd_value(rng))


def _bomb(rng: random.Random) -> str:
    """Aliases of aliases."""
    width, depth = rng.randint(2, 12), rng.randint(2, 30)
    lines = [f"x0: &x0 [{', '.join(['1'] * width)}]"]
    for level in range(1, depth):
        lines.append(f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * width)}]")
    return "\n".join(lines)


def _override(rng: random.Random, text: str) -> str:
    names = [line.partition(":")[0].strip() for line in text.splitlines() if ":" in line]
    path = ".".join(rng.choice(names) for _ in range(rng.choice([1, 1, 2, 2, 3, 60])))
    real = (
        *("training.optimizer.learning_rate", "training.optimizer.weight_decay", "seed", "steps"),
        *("objective.ratio_cap", "objective.advantage_clip", "training.tuning.rank"),
        *("training.threads", "training.hang_timeout_s", "prompts.limit", "sampling.top_p"),
        *("sampling.temperature", "sampling.max_new_tokens", "output_dir", "prompts_per_step"),
    )
    key = rng.choice([path, *real])
    return f"{key}={_odd_yaml(rng)}"


def _try(file: Path, content: bytes, overrides: list[str], counts: Counts) -> None:
    counts.tried += 1
    example = f"{content[:120]!r} {[each[:80] for each in overrides]}"
    file.write_bytes(content)
    began = time.monotonic()
    try:
        with over_time(_LIMIT_S):
            config = load_config(file, overrides)
            dumped = dump_config(config)
            again = check_config(json.loads(json.dumps(dumped)))
    except TimeoutError:
        counts.hang(example)
    except DistillError as error:
        if len(str(error)) > _MAX_MESSAGE:
            counts.mistake(f"a message of {len(str(error))} characters: {example}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        counts.traceback(f"{raised(error)}: {example}")
    else:
        if again != config or not _is_finite(dumped):
            counts.mistake(f"not the same when read again: {example}")
        if time.monotonic() - began > _LIMIT_S / 2:
            counts.hang(example)


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
