"""Profiles the controller's own work in sequential steps: what a run needs besides its engines.

    python -m benchmarks.speed.host_profile [--rollouts 256] [KEY.SUB=VALUE ...]

A run takes steps of 256 rollouts of 128 + 512 tokens with the objective (the teacher's 16 most
likely tokens), the verifier and the records of ``configs/h200.yaml``. What is behind the controller
is small: random models of one layer, the embedded engine and learner in a process of their own
each, and for SGLang the stand-in of the tests, a server that answers as SGLang does. The controller
does what it does with the real ones, but for a tokenizer of bytes. Of the steps after
the first two, half are measured, half profiled.

Figures, seconds a step: ``controller_cpu_s``, processor time of the controller's main thread;
``other_threads_cpu_s``, of its other threads (checking answers, files). ``PART_cpu_s`` is the part
of a package of this project in ``controller_cpu_s``, by a profile of the main thread: what others'
code and Python itself take counts for the package that calls them; ``event_loop`` is what none
calls. Processor time, as the machine may be shared. The first two steps are not measured: files
are opened, libraries imported and rollouts saved in them.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.lib.common import RESULTS, write_result
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.loading import load_tokenizer
from qwen3_distill.pipeline.run import run
from qwen3_distill.recording.console import SilentReporter
from qwen3_distill.recording.jsonl import read_jsonl
from tests.sglang_stand_in import write_interpreter
from tests.tiny_models import EOS_ID, write_model

CONFIG = Path(__file__).parents[2] / "configs" / "lab-vllm.yaml"
PROMPT_TOKENS, NEW_TOKENS = 128, 512
WARM_UP = 2
PACKAGE = "/qwen3_distill/"
ROOT = "event_loop"
"""Part that holds the functions which no package of this project calls."""
Function = tuple[str, int, str]
"""File, line and name, as `pstats` has them."""


class Measured(SilentReporter):
    """Measures the controller's thread from one step's end to the next ones'."""

    def __init__(self, steps: int) -> None:
        self.profile = cProfile.Profile(time.thread_time)
        self._steps = steps
        self._marks: dict[int, tuple[float, float]] = {}

    def stage(self, text: str) -> None:
        print(text, flush=True)

    def step(self, step: int, values: Mapping[str, float | None]) -> None:
        print("step", step, values.get("time/step_s"), flush=True)
        self._marks[step] = time.thread_time(), time.process_time()
        if step == WARM_UP + self._steps:
            self.profile.enable()
        elif step == WARM_UP + 2 * self._steps:
            self.profile.disable()

    def cpu_s(self) -> tuple[float, float]:
        """Return the seconds a step of the main thread, and of all others, without the profile."""
        (own, all_), (own_end, all_end) = self._marks[WARM_UP], self._marks[WARM_UP + self._steps]
        own_s = own_end - own
        return own_s / self._steps, (all_end - all_ - own_s) / self._steps


def seconds_by_part(stats: Mapping[Function, Any]) -> dict[str, float]:
    """Return the seconds of every package of this project, by the functions that it calls.

    A function of others counts for its callers, by the time that each of them caused.
    """
    known: dict[Function, dict[str, float]] = {}

    def shares_of(function: Function) -> dict[str, float]:
        if function in known:
            return known[function]
        if (part := _part_of(function)) is not None:
            return {part: 1.0}
        known[function] = {ROOT: 1.0}  # also where it is among its own callers
        callers = {caller: taken[3] for caller, taken in stats[function][4].items()}
        whole = sum(callers.values())
        if whole > 0:
            found = dict[str, float]()
            for caller, caused in callers.items():
                for part, share in shares_of(caller).items():
                    found[part] = found.get(part, 0.0) + share * caused / whole
            known[function] = found
        return known[function]

    seconds = dict[str, float]()
    for function, (_, _, own_s, _, _) in stats.items():
        for part, share in shares_of(function).items():
            seconds[part] = seconds.get(part, 0.0) + share * own_s
    return seconds


def _part_of(function: Function) -> str | None:
    """Return the package below this project's in which a function is; None: others' code."""
    _, found, inside = function[0].rpartition(PACKAGE)
    return inside.partition("/")[0].removesuffix(".py") if found else None


def dearest(stats: Mapping[Function, Any], steps: int, count: int = 12) -> list[dict[str, Any]]:
    """Return this project's functions that take most, with all that they call."""
    own = [(function, taken) for function, taken in stats.items() if _part_of(function)]
    own.sort(key=lambda item: -item[1][3])
    return [
        {
            "function": f"{file.rpartition(PACKAGE)[2]}:{name}",
            "calls": taken[1] / steps,
            "with_callees_s": round(taken[3] / steps, 5),
        }
        for (file, _, name), taken in own[:count]
    ]


def write_endless(folder: Path, seed: int) -> Path:
    """Write a small random model that hardly ever ends an answer."""
    write_model(folder, seed=seed, num_hidden_layers=1, num_attention_heads=1)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][EOS_ID] = 0  # the head's row, too; other logits are larger
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def write_prompts(path: Path, count: int, model: str) -> None:
    """Write prompts of `PROMPT_TOKENS` tokens, the chat's template included."""
    draw, tokenizer = random.Random(0), load_tokenizer(model)
    lines = list(_prompts(draw, tokenizer, count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _prompts(draw: random.Random, tokenizer: Any, count: int) -> Iterator[dict[str, str]]:
    def tokens(text: str) -> int:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return len(ids)

    letters = PROMPT_TOKENS - tokens("a") + 1
    for _ in range(count):
        text = "".join(draw.choice("abcdefghijkl mno") for _ in range(letters - 1)) + "?"
        assert tokens(text) == PROMPT_TOKENS
        yield {"question": text, "answer": str(draw.randint(0, 99))}


def config_of(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """Return the config of the run."""
    steps = WARM_UP + 2 * arguments.steps
    prompts = {
        "kind": "jsonl",
        "path": str(folder / "prompts.jsonl"),
        "prompt_field": "question",
        "answer_field": "answer",
    }
    embedded = {"kind": "embedded", "device": "cpu", "own_process": True, "threads": 1}
    student, teacher = (
        write_endless(folder / name, seed) for seed, name in enumerate(("student", "teacher"))
    )
    interpreter = write_interpreter(folder / "sglang", "export OMP_NUM_THREADS=1")
    given = [
        f"output_dir={folder / 'run'}",
        f"student.model={student}",
        f"scoring.model={teacher}",
        f"scoring.python={interpreter}",
        f"steps={steps}",
        f"prompts_per_step={arguments.rollouts}",
        f"prompts={json.dumps(prompts)}",
        f"sampling.max_new_tokens={NEW_TOKENS}",
        "sampling.temperature=0.3",  # an answer that `write_endless` lets end is rarer still
        f"generation={json.dumps(embedded)}",
        f"planning.prompt_tokens={PROMPT_TOKENS}",
        f"training={json.dumps(embedded)}",
        'objective={"kind": "top_k", "k": 16}',
        'verifier={"kind": "math"}',
        "evaluation=null",
        "checkpoint.every_steps=1000",
        *arguments.overrides,
    ]
    config = load_config(CONFIG, given)
    write_prompts(folder / "prompts.jsonl", arguments.rollouts * steps, config.student.model)
    return config


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Return figures and details."""
    config, measured = config_of(arguments, folder), Measured(arguments.steps)
    run(config, measured, print)
    own_s, others_s = measured.cpu_s()
    records = list(read_jsonl(Path(config.output_dir) / "metrics.jsonl"))
    plain = records[WARM_UP : WARM_UP + arguments.steps]
    stats: Mapping[Function, Any] = pstats.Stats(measured.profile).stats  # pyright: ignore
    parts = seconds_by_part(stats)
    whole = sum(parts.values())
    figures = {
        "controller_cpu_s": own_s,
        "other_threads_cpu_s": others_s,
        "profiled_cpu_s": whole / arguments.steps,
        "tokens": sum(each["tokens/generated"] for each in plain) / len(plain),
    }
    figures |= {f"{part}_cpu_s": own_s * taken / whole for part, taken in parts.items()}
    details = {"dearest": dearest(stats, arguments.steps)}
    return {name: round(value, 4) for name, value in figures.items()}, details


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1, help="measured, and as many profiled")
    parser.add_argument("--folder", type=Path, default=Path("runs/host-profile"))
    parser.add_argument("--name", default="host_profile", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_intermixed_args()
    folder = arguments.folder.resolve() / str(os.getpid())
    folder.mkdir(parents=True)
    figures, details = measure(arguments, folder)
    print(json.dumps(figures | details, indent=1), flush=True)
    print(write_result(arguments.name, figures, folder=arguments.results, **details))


if __name__ == "__main__":
    main()
