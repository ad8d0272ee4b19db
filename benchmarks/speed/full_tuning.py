"""Measures full fine-tuning whose states are divided over cards: tokens per second, memory.

On two cards of 80 GB, the 4B shape with random weights:

    python scripts/make_shape_model.py --shape 4B models/random-4B --device cuda
    python -m benchmarks.speed.full_tuning --model models/random-4B --check models/lab/student

It starts Ray on this machine, a rank on each card (`cluster.learner: {ranks: 2, sharded: true}`,
`training.kind: embedded`, float32 weights under bfloat16 autocast, every layer recomputed), takes a
step of other sequences first, then `--rounds` steps of `--sequences` x (`--prompt-tokens` +
`--new-tokens`) random tokens, and publishes to a folder in memory, whose digest is compared.
``--cards 0`` runs on the CPU, to try the command.

Writes ``benchmarks/results/full_tuning_x2.json``: ``full_ft_tok_s`` (prompts counted, whole steps),
``full_ft_peak_gib`` (the fullest card, as nvidia-smi sees it, all of the process counted),
``full_ft_allocated_gib`` (the same as PyTorch counts its tensors), ``full_ft_planned_gib`` (what
`qwen3-distill plan` says, without the reserve), ``full_ft_publish_s``, ``full_ft_save_s``. With
``--check`` a small model takes the same three steps on the ranks and on one learner that holds all:
``full_ft_loss_gap`` and ``full_ft_norm_gap``, the largest relative differences (absolute ones of
numbers below 1).
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.lib.cards import peak_memory
from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.random_work import Work, total_tokens
from benchmarks.lib.stage_parts import peak_gib
from qwen3_distill.config import RunConfig
from qwen3_distill.config.load import check_config
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.pipeline.assembly.channel import shared_memory_dir
from qwen3_distill.pipeline.assembly.engines import build_learner
from qwen3_distill.pipeline.assembly.fleet import RunCluster
from qwen3_distill.planning.plan import lay_out
from qwen3_distill.ports import Learner
from qwen3_distill.weights.directory import DirectoryChannel

_CHECKED_STEPS = 3


def config_of(arguments: argparse.Namespace, model: str, output: Path) -> RunConfig:
    """Return a run whose learner's ranks divide its states."""
    on_gpu = arguments.cards > 0
    per_sequence = arguments.prompt_tokens + arguments.new_tokens
    embedded = {"kind": "embedded", "own_process": True, "device": "cuda" if on_gpu else "cpu"}
    return check_config(
        {
            "output_dir": str(output),
            "steps": 1000,
            "prompts_per_step": arguments.sequences,
            "student": {"model": model},
            "prompts": {"kind": "task"},
            "sampling": {"max_new_tokens": arguments.new_tokens},
            "generation": embedded,
            "scoring": embedded | {"model": model},
            "training": embedded
            | {
                "dtype": "float32",
                "tuning": {"kind": "full"},
                "micro_batch_tokens": arguments.micro_batch_sequences * per_sequence,
                "gradient_checkpointing": True,
                "start_timeout_s": 1800,
                "hang_timeout_s": 600,
            },
            "objective": {"kind": "sampled_reverse_kl"},
            "planning": {"prompt_tokens": arguments.prompt_tokens},
            "cluster": {
                "learner": {"ranks": arguments.ranks, "cards": arguments.cards, "sharded": True}
            },
        }
    )


def work_of(arguments: argparse.Namespace, config: RunConfig) -> Work:
    return Work(
        config=config,
        sequences=arguments.sequences,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        opd_steps=0,
        vocab_size=load_identity(config.student.model).vocab_size,
    )


@contextlib.asynccontextmanager
async def started(config: RunConfig) -> AsyncIterator[Learner]:
    """Start the config's learner, and Ray if it names a cluster."""

    def say(text: str) -> None:
        print(text, flush=True)

    cluster = None if config.cluster is None else RunCluster(config, config.cluster, say)
    learner = build_learner(config, None, None, cluster)
    try:
        if cluster is not None:
            await cluster.start(say)
        await learner.start()
        yield learner
    finally:
        await learner.close()
        if cluster is not None:
            await cluster.close()


async def measure(work: Work, report: Report, folder: Path) -> None:
    learner = None if work.config.cluster is None else work.config.cluster.learner
    on_gpu = learner is not None and learner.cards > 0
    with peak_memory() if on_gpu else contextlib.nullcontext([]) as on_cards:
        async with started(work.config) as group:
            _, first_s = await timed(group.update(work.batch(max(4, work.sequences // 4))))
            batch, steps, allocated = work.batch(work.sequences), [], []
            for _ in range(work.rounds):
                update, step_s = await timed(group.update(batch))
                steps.append(step_s)
                allocated.append(peak_gib(update))
                print(f"step: {step_s:.1f} s, loss {update.loss:.4f}", flush=True)
            with tempfile.TemporaryDirectory(dir=shared_memory_dir()) as memory:
                channel = DirectoryChannel(Path(memory))
                await group.publish(channel)  # the first one imports what the channel needs
                version, publish_s = await timed(group.publish(channel))
                if weights_digest(channel.fetch(version).tensors) != version.digest:
                    raise RuntimeError("what was published has another digest than the step")
            state = folder / "state"
            state.mkdir()
            _, save_s = await timed(group.save_state(state))
    tokens = total_tokens([scored.rollout for scored in batch.scored])
    plan = lay_out(work.config, engines=("learner",))
    figures = {
        "full_ft_tok_s": tokens * len(steps) / sum(steps),
        "full_ft_peak_gib": max(on_cards, default=0.0),
        "full_ft_allocated_gib": max(allocated),
        "full_ft_planned_gib": plan.engine_bytes("learner") / GIB,
        "full_ft_publish_s": publish_s,
        "full_ft_save_s": save_s,
    }
    details: dict[str, Any] = {"steps_s": steps, "first_step_s": first_s, "peaks_gib": on_cards}
    report.add("full_tuning", figures, model=work.config.student.model, **details)


async def check(work: Work, report: Report) -> None:
    """Compare the ranks' steps of a small model with those of one learner that holds all."""
    batches = [work.batch(count) for count in (work.sequences, 3, 1)]
    numbers = []
    for config in (work.config, work.config.model_copy(update={"cluster": None})):
        async with started(config) as learner:
            updates = [await learner.update(batch) for batch in batches[:_CHECKED_STEPS]]
            numbers.append([(update.loss, update.grad_norm) for update in updates])
    gaps = [
        [abs(a - b) / max(1.0, abs(b)) for a, b in zip(many, one, strict=True)]
        for many, one in zip(*numbers, strict=True)
    ]
    figures = {
        "full_ft_loss_gap": max(loss for loss, _ in gaps),
        "full_ft_norm_gap": max(norm for _, norm in gaps),
    }
    report.add("check", figures, model=work.config.student.model, ranks_then_one=numbers)


async def run_part(arguments: argparse.Namespace) -> None:
    report = Report(arguments.name, arguments.results)
    model = arguments.check if arguments.part == "check" else arguments.model
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-full-tuning-") as folder:
        work = work_of(arguments, config_of(arguments, model, Path(folder) / "run"))
        if arguments.part == "check":
            await check(work, report)
        else:
            await measure(work, report, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the student")
    parser.add_argument("--check", help="directory of a small model whose steps are compared")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cards", type=int, default=1, help="of each rank; 0: the CPU")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch-sequences", type=int, default=16)
    parser.add_argument("--name", default="full_tuning_x2", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--part", choices=("measure", "check"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        asyncio.run(run_part(arguments))
        return
    # A process has one Ray.
    for part in ("measure", "check") if arguments.check else ("measure",):
        command = [sys.executable, "-m", "benchmarks.speed.full_tuning", *sys.argv[1:]]
        subprocess.run([*command, "--part", part], check=True)


if __name__ == "__main__":
    main()
