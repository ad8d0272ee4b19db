"""Measures TRL's DistillationTrainer with vLLM in one process, on the work of `speed/stages.py`.

    PYTHONPATH=/site/train:/site/vllm python -m benchmarks.speed.trl_distillation \
        --student models/random-4B --teacher models/random-8B --micro-batches 8,16,32 --out trl.json

One optimizer step is 256 prompts of 128 tokens with up to 512 new tokens each, LoRA r32 on all
linear layers, reverse KL over the full vocabulary (TRL has no other). Every micro-batch gets a
process of its own: a first step to warm up, then the measured ones, each from its beginning to its
end, weights to vLLM included. Needs trl and vllm in one interpreter, and nothing of this package
but the file beside it.

vLLM 0.26 and TRL 1.15: TRL merges the adapters and copies all weights into vLLM every step; nothing
in this way of using it imports ray.
"""

# pyright: reportMissingImports=false
# ruff: noqa: PLC0415 - the parent process must not load what a child measures
import argparse
import importlib.util
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.device_memory import PeakMemory

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    arguments = parse()
    if arguments.child is not None:
        arguments.out.write_text(json.dumps(measure(arguments, arguments.child)) + "\n")
        return
    runs = [run_child(arguments, size, recomputes=True) for size in arguments.micro_batches]
    runs += [run_child(arguments, size, recomputes=False) for size in arguments.no_checkpointing]
    finished = [run for run in runs if "opd_tok_s" in run]
    if not finished:
        sys.exit("no micro-batch finished")
    best = max(finished, key=lambda run: run["opd_tok_s"])
    arguments.out.write_text(json.dumps({"runs": runs, "best": best}, indent=2) + "\n")
    print(json.dumps(best, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--prompts", type=int, default=256, help="of one optimizer step")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1, help="measured, after one to warm up")
    parser.add_argument("--micro-batches", type=sizes, default=[8, 16, 32], help="sizes to try")
    parser.add_argument(
        "--no-checkpointing",
        type=sizes,
        default=[],
        metavar="SIZES",
        help="sizes to try as well, with no layer recomputed",
    )
    parser.add_argument("--vllm-memory", type=float, default=0.3, help="of the device's memory")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--generator",
        default="vllm",
        choices=["vllm", "transformers"],
        help="transformers: a check of this script where there is no vLLM",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--keep-activations", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes(text: str) -> list[int]:
    """Comma-separated numbers."""
    return [int(size) for size in text.split(",")]


def run_child(
    arguments: argparse.Namespace, micro_batch: int, *, recomputes: bool
) -> dict[str, Any]:
    """Measure one micro-batch in a process of its own; on failure return its last output."""
    out = arguments.out.with_suffix(f".{micro_batch}.json")
    out.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.trl_distillation",
        *sys.argv[1:],
        "--out",
        str(out),
    ]
    command += ["--child", str(micro_batch)]
    command += [] if recomputes else ["--keep-activations"]
    what = {"micro_batch": micro_batch, "recomputes": recomputes}
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wall_s = time.perf_counter() - began
    if done.returncode != 0 or not out.exists():
        print(done.stdout[-4000:], file=sys.stderr)
        return what | {"failed": done.stdout[-1000:], "wall_s": wall_s}
    result = what | json.loads(out.read_text()) | {"wall_s": wall_s}
    out.unlink()
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def measure(arguments: argparse.Namespace, micro_batch: int) -> dict[str, Any]:
    """Measure the trainer's steps with one micro-batch size."""
    if arguments.prompts % micro_batch:
        sys.exit(f"--micro-batches: {micro_batch} does not divide {arguments.prompts} prompts")
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DistillationTrainer

    class Clock(TrainerCallback):
        """Records the seconds of every optimizer step, generation included."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self._began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self._began)

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if importlib.util.find_spec("flashinfer") is None:  # vLLM takes it for granted on Hopper
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    clock = Clock()
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=arguments.student,
            teacher_model=arguments.teacher,
            args=trainer_config(arguments, micro_batch, folder),
            train_dataset=prompts(arguments),
            peft_config=LoraConfig(
                r=arguments.rank,
                lora_alpha=arguments.rank,
                lora_dropout=0.0,
                target_modules=list(TARGET_MODULES),
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    tokens = [entry["completions/mean_length"] * arguments.prompts for entry in logs]
    measured = slice(1, None)
    return {
        "micro_batch": micro_batch,
        "opd_tok_s": sum(tokens[measured]) / sum(clock.seconds[measured]),
        "step_s": sum(clock.seconds[measured]) / arguments.steps,
        "warm_up_step_s": clock.seconds[0],
        "tokens_per_step": sum(tokens[measured]) / arguments.steps,
        "peak_gib": memory.peak_gib,
        "versions": versions(),
    }


def trainer_config(arguments: argparse.Namespace, micro_batch: int, folder: str) -> Any:
    """A `DistillationConfig` for one optimizer step per generated batch."""
    import torch
    from trl import DistillationConfig

    on_gpu = torch.cuda.is_available()
    with_vllm: dict[str, Any] = {}
    if arguments.generator == "vllm":
        with_vllm = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": arguments.vllm_memory,
            "vllm_max_model_length": arguments.prompt_tokens + arguments.new_tokens,
        }
    return DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=arguments.prompts // micro_batch,
        max_steps=1 + arguments.steps,
        max_completion_length=arguments.new_tokens,
        temperature=1.0,
        beta=1.0,  # KL(student || teacher)
        learning_rate=1e-5,
        gradient_checkpointing=not arguments.keep_activations,
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


def prompts(arguments: argparse.Namespace) -> Any:
    """Texts of an exact number of tokens, for every step."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    draw = random.Random(0)
    count = arguments.prompts * (1 + arguments.steps)
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
