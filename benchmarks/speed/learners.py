"""Measures kinds of learners beside each other on one card: tokens per second of their steps.

    python -m benchmarks.speed.learners --config configs/h200.yaml \\
        --learners unsloth,embedded,compiled,compiled_fp8_backward \\
        student.model=/models/qwen3-4b scoring.model=/models/qwen3-8b

Every learner has a process of its own, takes the same steps of random tokens, and is closed before
the next begins. `_top16` behind a name takes the objective over the teacher's top 16 instead of the
sampled token, `_shared` computes a prompt once for all of its answers (`samples_per_prompt=4`).
Figures: `train_<learner>_tok_s`, every answer's prompt included, its peak memory, and its ratio to
unsloth's.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.random_work import Work, total_tokens
from benchmarks.lib.stage_parts import peak_gib, started_learner
from qwen3_distill.config import (
    RunConfig,
    TaskPrompts,
    TopKDivergence,
    UnslothTraining,
)
from qwen3_distill.config.engines import EmbeddedTraining
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.loading import load_identity

_EMBEDDED: dict[str, dict[str, Any]] = {
    "embedded": {},
    "compiled": {"compiled": True},
    "fp8": {"base_precision": "fp8"},
    "compiled_fp8_backward": {"compiled": True, "base_precision": "fp8_backward"},
}
_DENSE, _SHARED = "_top16", "_shared"


def config_of(name: str, config: RunConfig, micro_batch_tokens: int) -> RunConfig:
    """Return the config with one learner of the table, and its objective."""
    plain = _plain(name)
    assert isinstance(config.training, UnslothTraining)
    training: Any = config.training.model_copy(
        update={"gradient_checkpointing": "off", "micro_batch_tokens": micro_batch_tokens}
    )
    if plain != "unsloth":
        training = EmbeddedTraining(
            kind="embedded",
            own_process=True,
            device="cuda",
            dtype="bfloat16",
            tuning=config.training.tuning,
            optimizer=config.training.optimizer,
            micro_batch_tokens=micro_batch_tokens,
            start_timeout_s=config.training.start_timeout_s,
            hang_timeout_s=config.training.hang_timeout_s,
            **_EMBEDDED[plain],
        )
    if _SHARED in name:
        training = training.model_copy(update={"shared_prompts": True})
    changes: dict[str, Any] = {"training": training}
    if name.endswith(_DENSE):
        changes["objective"] = TopKDivergence(kind="top_k", k=16)
    return config.model_copy(update=changes)


def _plain(name: str) -> str:
    return name.removesuffix(_DENSE).removesuffix(_SHARED)


async def measure(work: Work, report: Report, names: Sequence[str], micro: int) -> None:
    for name in names:
        config = config_of(name, work.config, micro)
        own = Work(**{**vars(work), "config": config})
        learner, start_s = await started_learner(config)
        try:
            _, first_s = await timed(learner.update(own.batch(own.sequences // 4)))
            batch, steps, peaks = own.batch(own.sequences), [], []
            for _ in range(own.rounds):
                update, step_s = await timed(learner.update(batch))
                steps.append(step_s)
                peaks.append(peak_gib(update))
        finally:
            await learner.close()
        tokens = total_tokens([scored.rollout for scored in batch.scored])
        figures = {
            f"train_{name}_tok_s": tokens * len(steps) / sum(steps),
            f"train_{name}_peak_gib": max(peaks),
        }
        beside = report.figures.get("train_unsloth_tok_s")
        if beside and name != "unsloth":
            figures[f"train_{name}_vs_unsloth"] = figures[f"train_{name}_tok_s"] / beside
        report.add(name, figures, start_s=start_s, first_step_s=first_s, steps_s=steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="with an unsloth learner")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    names = ["unsloth", *_EMBEDDED]
    parser.add_argument("--learners", default=",".join(names), help="comma-separated")
    parser.add_argument("--name", default="h200_learners", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch-sequences", type=int, default=16)
    arguments = parser.parse_args()
    wanted = arguments.learners.split(",")
    if unknown := [name for name in wanted if _plain(name) not in names]:
        parser.error(f"no such learner: {', '.join(unknown)}; there are {', '.join(names)}")
    given = load_config(arguments.config, arguments.overrides)
    config = given.model_copy(
        update={"prompts": TaskPrompts(kind="task"), "verifier": None, "evaluation": None}
    )
    work = Work(
        config=config,
        sequences=arguments.sequences,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        opd_steps=0,
        vocab_size=load_identity(config.student.model).vocab_size,
    )
    report = Report(arguments.name, arguments.results)
    micro = arguments.micro_batch_sequences * (arguments.prompt_tokens + arguments.new_tokens)
    asyncio.run(measure(work, report, wanted, micro))


if __name__ == "__main__":
    main()
