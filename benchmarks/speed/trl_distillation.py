"""Measures TRL's DistillationTrainer with vLLM in one process, on the work of `speed/overlap.py`.

    PYTHONPATH=/site/trl:/site/train:/site/vllm python -m benchmarks.speed.trl_distillation \
        --student models/random-4B --teacher models/random-8B --results out --name h200_trl \
        --settings 8:off:fixed,16:on:fixed,2:off:longtail8 --max-tokens 2048

One optimizer step is 256 prompts of 128 tokens, LoRA r32 on all linear layers, reverse KL over the
full vocabulary (TRL has no other). ``fixed``: every answer has ``--new-tokens``; ``longtail8``: a
lognormal length with a median of ``--median-tokens`` and a 99th percentile of 8 times as much, cut
at ``--max-tokens``, the lengths that `speed/overlap.py` draws for its first step.

A setting is MICRO_BATCH:RECOMPUTES:WORK[+WORK]: sequences of a micro-batch, ``on`` if every layer
is recomputed, and the works to measure. Each has a process of its own: a first step with a quarter
of the first work's lengths to warm up, then a step of each work, from its beginning to its end,
weights to vLLM included. Needs trl and vllm in one interpreter.

vLLM 0.26 and TRL 1.16: TRL merges the adapters and copies all weights into vLLM every step, and
pads every micro-batch to the longest answer of the step.
"""

# pyright: reportMissingImports=false
# ruff: noqa: PLC0415 - the parent process must not load what a child measures
import argparse
import importlib.util
import json
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.overlap_parts import Lengths

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    arguments = parse()
    if arguments.child is not None:
        arguments.out.write_text(json.dumps(measure(arguments, arguments.child)) + "\n")
        return
    from benchmarks.lib.common import Report

    report = Report(arguments.name, arguments.results)
    runs: list[dict[str, Any]] = report.parts.get("runs", {}).get("runs", [])
    for setting in arguments.settings:
        runs.append(run_child(arguments, setting))
        report.add("runs", best_of(runs), runs=runs)
    if not any("works" in run for run in runs):
        sys.exit("no setting finished")


@dataclass(frozen=True)
class Setting:
    """How one process trains, and what is measured in it."""

    micro_batch: int
    recomputes: bool
    works: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Parse ``MICRO_BATCH:on|off:WORK[+WORK]``."""
        try:
            size, recomputes, works = text.split(":")
            return cls(int(size), {"on": True, "off": False}[recomputes], tuple(works.split("+")))
        except (KeyError, ValueError):
            message = f"{text!r} is not MICRO_BATCH:on|off:WORK[+WORK]"
            raise argparse.ArgumentTypeError(message) from None

    def __str__(self) -> str:
        recomputes = "on" if self.recomputes else "off"
        return f"{self.micro_batch}:{recomputes}:{'+'.join(self.works)}"


def settings(text: str) -> list[Setting]:
    """Comma-separated settings."""
    return [Setting.parse(item) for item in text.split(",")]


def best_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the fastest run of each work as figures."""
    figures = dict[str, float]()
    for run in runs:
        for work, found in run.get("works", {}).items():
            if found["tok_s"] > figures.get(f"trl_{work}_tok_s", 0):
                figures[f"trl_{work}_tok_s"] = found["tok_s"]
                figures[f"trl_{work}_step_s"] = found["step_s"]
                figures[f"trl_{work}_micro_batch"] = run["micro_batch"]
                figures[f"trl_{work}_peak_gib"] = run["peak_gib"]
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--settings", type=settings, default=settings("8:off:fixed,16:on:fixed"))
    parser.add_argument("--prompts", type=int, default=256, help="of one optimizer step")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--median-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--vllm-memory", type=float, default=0.3, help="of the device's memory")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--generator",
        default="vllm",
        choices=["vllm", "transformers"],
        help="transformers: a check of this script where there is no vLLM; answers are cut to "
        "their lengths after they were sampled",
    )
    parser.add_argument("--name", default="trl", help="of the result")
    parser.add_argument("--results", type=Path, default=Path("out"), help="folder of the result")
    parser.add_argument("--child-limit-s", type=float, help="for each setting")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Setting.parse, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Measure one setting in a process of its own; on failure return its last output."""
    out = arguments.results / "trl-child.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.speed.trl_distillation", *sys.argv[1:]]
    command += ["--out", str(out), "--child", str(setting)]
    what = {"micro_batch": setting.micro_batch, "recomputes": setting.recomputes}
    began = time.perf_counter()
    log = out.with_suffix(".log")
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = child.wait(arguments.child_limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    wall_s = time.perf_counter() - began
    if code != 0 or not out.exists():
        text = log.read_text(errors="replace")
        print(text[-4000:], file=sys.stderr)
        return what | {"failed": text[-1000:], "wall_s": wall_s, "code": code}
    result = what | json.loads(out.read_text()) | {"wall_s": wall_s}
    out.unlink()
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


class ForcedLengths:
    """Gives every answer of a step its length; the first step's are a quarter of the second's."""

    def __init__(self, arguments: argparse.Namespace, works: Sequence[str]) -> None:
        self._arguments = arguments
        self._works = (works[0], *works)
        self._step = 0

    def next(self, count: int) -> list[int]:
        """Return the lengths of the next step's answers."""
        work, warms_up = self._works[self._step], self._step == 0
        self._step += 1
        given = self._arguments
        median = given.new_tokens if work == "fixed" else given.median_tokens
        lengths = Lengths(work, median, given.max_tokens)
        found = [lengths.of(f"step-0/{number}") for number in range(count)]
        return [max(1, tokens // 4) for tokens in found] if warms_up else found

    def in_vllm(self) -> None:
        """Have vLLM sample each prompt's answer to its length."""
        from vllm import LLM

        generate = LLM.generate

        def forced(llm: Any, prompts: Any, sampling_params: Any, **options: Any) -> Any:
            each = []
            for tokens in self.next(len(prompts)):
                params = sampling_params.clone()
                params.max_tokens, params.ignore_eos = tokens, True
                each.append(params)
            return generate(llm, prompts, each, **options)

        LLM.generate = forced

    def in_transformers(self, trainer: Any) -> None:
        """Cut answers to their lengths."""
        sample = trainer._generate_single_turn

        def cut(*given: Any, **options: Any) -> Any:
            answers = sample(*given, **options)
            lengths = self.next(len(answers))
            return [ids[:tokens] for ids, tokens in zip(answers, lengths, strict=True)]

        trainer._generate_single_turn = cut


def make_clock() -> Any:
    """Make a callback with the seconds of every optimizer step, generation included."""
    import torch
    from transformers import TrainerCallback

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self._began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self._began)

    return Clock()


def measure(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Measure the trainer's steps with one setting."""
    if arguments.prompts % setting.micro_batch:
        sys.exit(f"--settings: {setting.micro_batch} does not divide {arguments.prompts} prompts")
    from peft import LoraConfig
    from trl import DistillationTrainer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if importlib.util.find_spec("flashinfer") is None:  # vLLM takes it for granted on Hopper
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    clock, lengths = make_clock(), ForcedLengths(arguments, setting.works)
    if arguments.generator == "vllm":
        lengths.in_vllm()
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=arguments.student,
            teacher_model=arguments.teacher,
            args=trainer_config(arguments, setting, folder),
            train_dataset=prompts(arguments, 1 + len(setting.works)),
            peft_config=LoraConfig(
                r=arguments.rank,
                lora_alpha=arguments.rank,
                lora_dropout=0.0,
                target_modules=list(TARGET_MODULES),
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        if arguments.generator == "transformers":
            lengths.in_transformers(trainer)
        trainer.train()
    return {
        "works": works_of(trainer.state.log_history, clock.seconds, arguments, setting),
        "warm_up_step_s": clock.seconds[0],
        "peak_gib": memory.peak_gib,
        "versions": versions(),
    }


def works_of(
    history: Sequence[Any],
    seconds: Sequence[float],
    arguments: argparse.Namespace,
    setting: Setting,
) -> dict[str, dict[str, float]]:
    """Return what the trainer logged of each work's step.

    Args:
        history: the trainer's log.
        seconds: of every step; the first is the warm-up.
    """
    logs = [entry for entry in history if "completions/mean_length" in entry]
    tokens = [entry["completions/mean_length"] * arguments.prompts for entry in logs]
    return {
        work: {
            "tok_s": tokens[step] / seconds[step],
            "step_s": seconds[step],
            "tokens": tokens[step],
            "longest": logs[step]["completions/max_length"],
        }
        for step, work in enumerate(setting.works, start=1)
    }


def trainer_config(arguments: argparse.Namespace, setting: Setting, folder: str) -> Any:
    """A `DistillationConfig` for one optimizer step per generated batch."""
    import torch
    from trl import DistillationConfig

    on_gpu = torch.cuda.is_available()
    fixed = set(setting.works) == {"fixed"}
    longest = arguments.new_tokens if fixed else arguments.max_tokens
    with_vllm: dict[str, Any] = {}
    if arguments.generator == "vllm":
        with_vllm = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": arguments.vllm_memory,
            "vllm_max_model_length": arguments.prompt_tokens + longest,
        }
    return DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=arguments.prompts // setting.micro_batch,
        max_steps=1 + len(setting.works),
        max_completion_length=longest,
        temperature=1.0,
        beta=1.0,  # KL(student || teacher)
        learning_rate=1e-5,
        gradient_checkpointing=setting.recomputes,
        bf16=arguments.dtype == "bfloat16",
        use_cpu=not on_gpu,
        model_init_kwargs={"dtype": arguments.dtype, "attn_implementation": "sdpa"},
        teacher_model_init_kwargs={"dtype": arguments.dtype, "attn_implementation": "sdpa"},
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **with_vllm,
    )


def prompts(arguments: argparse.Namespace, steps: int) -> Any:
    """Texts of an exact number of tokens, for every step."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    draw = random.Random(0)
    count = arguments.prompts * steps
    texts = [
        "".join(draw.choices(string.ascii_letters, k=arguments.prompt_tokens)) for _ in range(count)
    ]
    lengths = {len(ids) for ids in tokenizer(texts)["input_ids"]}
    if lengths != {arguments.prompt_tokens}:
        sys.exit(
            f"prompts have {sorted(lengths)} tokens instead of {arguments.prompt_tokens}: the "
            "student needs a tokenizer of bytes, as scripts/make_shape_model.py writes it"
        )
    return Dataset.from_dict({"prompt": texts})


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("trl", "vllm", "torch", "transformers", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
