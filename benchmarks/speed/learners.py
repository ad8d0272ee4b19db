"""Measures kinds of learners beside each other on one card: tokens per second of their steps.

    python -m benchmarks.speed.learners --config configs/h200.yaml \\
        --learners unsloth,unsloth_shared,compiled_fp8_backward,compiled_fp8_backward_shared \\
        --works 128x512:4,300x508:4,128xlongtail8:1 \\
        student.model=/models/qwen3-4b scoring.model=/models/qwen3-8b

Every learner has a process of its own, takes the same steps of random tokens, and is closed before
the next is measured; with ``--together`` all start at the same time. ``NAME@WORK+WORK`` takes some
of the works only. Behind a name, ``_top16``
takes the objective over the teacher's top 16 instead of the sampled token, ``_shared`` computes a
prompt once for all of its answers, ``_packed`` packs rows instead of padding them,
``_fp8_backward`` computes input gradients of frozen layers in FP8, and ``_eager`` is unsloth
without its compiled layers.

A work is PROMPTxANSWER:SAMPLES: tokens of a prompt and of an answer, and answers to a prompt.
``longtail8`` for the answer's tokens: lognormal with a median of ``--median-tokens`` and a 99th
percentile of 8 times as much, cut at ``--max-tokens``.

Figures: ``train_<learner>_<work>_tok_s``, every answer's prompt counted, and the ratio to
unsloth's; the peak memory. Without ``--works`` the names have no work in them.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.overlap_parts import Lengths
from benchmarks.lib.random_work import Work, total_tokens
from benchmarks.lib.stage_parts import peak_gib, started_learner
from qwen3_distill.config import (
    RunConfig,
    SampledReverseKL,
    TaskPrompts,
    TopKDivergence,
    UnslothTraining,
)
from qwen3_distill.config.engines import EmbeddedTraining
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.ports import Learner

_EMBEDDED: dict[str, dict[str, Any]] = {
    "embedded": {},
    "compiled": {"compiled": True},
    "fp8": {"base_precision": "fp8"},
}
_CHANGES: dict[str, dict[str, Any]] = {
    "_top16": {},
    "_shared": {"shared_prompts": True},
    "_packed": {"packing": True},
    "_fp8_backward": {"base_precision": "fp8_backward"},
    "_eager": {"environment": {"UNSLOTH_BLOCK_COMPILE": "0"}},
}
ROUNDED = ("unsloth_fp8_backward", "compiled_fp8_backward")
"""Learners with FP8 in frozen layers."""
_OF_UNSLOTH = ("_packed", "_eager")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths of the sequences of a step."""

    name: str
    """In the figures' names; empty: the only shape."""
    prompt_tokens: int
    answer: str
    """Tokens, or the name of a distribution."""
    samples: int

    @classmethod
    def parse(cls, text: str) -> list["Shape"]:
        """Parse ``PROMPTxANSWER:SAMPLES,...``."""
        shapes = []
        for item in filter(None, text.split(",")):
            lengths, _, samples = item.partition(":")
            prompt, _, answer = lengths.partition("x")
            name = f"{prompt}x{answer}_n{samples}"
            shapes.append(
                cls(name=name, prompt_tokens=int(prompt), answer=answer, samples=int(samples))
            )
        return shapes

    def work(self, config: RunConfig, arguments: argparse.Namespace, vocab_size: int) -> Work:
        """Return the step's random rollouts."""
        lengths, new_tokens = None, 0
        if self.answer.isdigit():
            new_tokens = int(self.answer)
        else:
            lengths = Lengths(self.answer, arguments.median_tokens, arguments.max_tokens)
        return Work(
            config=config.model_copy(update={"samples_per_prompt": self.samples}),
            sequences=arguments.sequences,
            prompt_tokens=self.prompt_tokens,
            new_tokens=new_tokens or arguments.max_tokens,
            rounds=arguments.rounds,
            opd_steps=0,
            vocab_size=vocab_size,
            length_of=None if lengths is None else lambda n: lengths.of(f"step-0/{n}"),
        )


def config_of(name: str, config: RunConfig, micro_batch_tokens: int) -> RunConfig:
    """Return the config with one learner of the table, and its objective."""
    plain, given = _parts(name)
    assert isinstance(config.training, UnslothTraining)
    training: Any = config.training.model_copy(
        update={
            "gradient_checkpointing": "off",
            "micro_batch_tokens": micro_batch_tokens,
            "packing": False,
        }
    )
    if plain != "unsloth":
        training = EmbeddedTraining(
            kind="embedded",
            own_process=True,
            device="auto",
            dtype="bfloat16",
            tuning=config.training.tuning,
            optimizer=config.training.optimizer,
            micro_batch_tokens=micro_batch_tokens,
            start_timeout_s=config.training.start_timeout_s,
            hang_timeout_s=config.training.hang_timeout_s,
            **_EMBEDDED[plain],
        )
    for change in given:
        update = dict(_CHANGES[change])
        if "environment" in update:
            update["environment"] = training.environment | update["environment"]
        training = training.model_copy(update=update)
    objective = (
        TopKDivergence(kind="top_k", k=16)
        if "_top16" in given
        else SampledReverseKL(kind="sampled_reverse_kl")
    )
    return config.model_copy(update={"training": training, "objective": objective})


def _name(wanted: str) -> str:
    return wanted.partition("@")[0]


def _parts(name: str) -> tuple[str, list[str]]:
    """Split a learner's name into the plain one and what changes it."""
    given = list[str]()
    while (change := next((each for each in _CHANGES if name.endswith(each)), None)) is not None:
        name = name.removesuffix(change)
        given.append(change)
    return name, given


async def measure(
    shapes: Sequence[Shape], config: RunConfig, report: Report, arguments: argparse.Namespace
) -> None:
    vocab_size = load_identity(config.student.model).vocab_size
    names: list[str] = arguments.learners
    for group in [names] if arguments.together else [[name] for name in names]:
        configs = [config_of(_name(each), config, arguments.micro_batch_tokens) for each in group]
        started = await asyncio.gather(*map(started_learner, configs), return_exceptions=True)
        for wanted, of_learner, result in zip(group, configs, started, strict=True):
            name = _name(wanted)
            if isinstance(result, BaseException):
                print(f"{name} was not measured: {result}", flush=True)
                continue
            learner, start_s = result
            try:
                for shape in Shape.parse(wanted.partition("@")[2].replace("+", ",")) or shapes:
                    work = shape.work(of_learner, arguments, vocab_size)
                    await measure_steps(name, shape, work, report, learner, start_s)
            finally:
                await learner.close()


async def measure_steps(
    name: str, shape: Shape, work: Work, report: Report, learner: Learner, start_s: float
) -> None:
    """Measure one learner's steps on one shape."""
    batch, steps, peaks = work.batch(work.sequences), [], []
    update, first_s = await timed(learner.update(batch))
    for _ in range(work.rounds):
        update, step_s = await timed(learner.update(batch))
        steps.append(step_s)
        peaks.append(peak_gib(update))
    tokens = total_tokens([scored.rollout for scored in batch.scored])
    suffix = f"_{shape.name}" if shape.name else ""
    figures = {
        f"train_{name}{suffix}_tok_s": tokens * len(steps) / sum(steps),
        f"train_{name}{suffix}_peak_gib": max(peaks),
    }
    beside = report.figures.get(f"train_unsloth{suffix}_tok_s")
    if beside and name != "unsloth":
        figures[f"train_{name}{suffix}_vs_unsloth"] = (
            figures[f"train_{name}{suffix}_tok_s"] / beside
        )
    details = {
        metric.key: metric.total
        for metric in update.metrics
        if metric.key in ("train/input_tokens", "train/padding_tokens")
    }
    describe = getattr(learner, "describe", dict)
    report.add(
        f"{name}{suffix}",
        figures,
        start_s=start_s,
        first_step_s=first_s,
        steps_s=steps,
        tokens=tokens,
        learner={str(key): str(value) for key, value in describe().items()},
        **details,
    )


def main() -> None:
    arguments = parse()
    shapes = arguments.works
    if not shapes:
        prompt, answer = arguments.prompt_tokens, str(arguments.new_tokens)
        shapes = [Shape(name="", prompt_tokens=prompt, answer=answer, samples=arguments.samples)]
    arguments.micro_batch_tokens = arguments.micro_batch_tokens or (
        arguments.micro_batch_sequences * (arguments.prompt_tokens + arguments.new_tokens)
    )
    given = load_config(arguments.config, arguments.overrides)
    config = given.model_copy(
        update={"prompts": TaskPrompts(kind="task"), "verifier": None, "evaluation": None}
    )
    report = Report(arguments.name, arguments.results)
    asyncio.run(measure(shapes, config, report, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="with an unsloth learner")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    plain = ["unsloth", *_EMBEDDED]
    parser.add_argument("--learners", type=lambda text: text.split(","), default=[*plain, *ROUNDED])
    parser.add_argument("--works", type=Shape.parse, default=[])
    parser.add_argument("--together", action="store_true", help="start all at the same time")
    parser.add_argument("--name", default="h200_learners", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="without --works")
    parser.add_argument("--new-tokens", type=int, default=512, help="likewise")
    parser.add_argument("--samples", type=int, default=1, help="answers to a prompt, likewise")
    parser.add_argument("--median-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch-sequences", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, help="instead of whole sequences")
    arguments = parser.parse_intermixed_args()
    for name in map(_name, arguments.learners):
        unsloth_only = [change for change in _parts(name)[1] if change in _OF_UNSLOTH]
        if _parts(name)[0] not in plain or (unsloth_only and _parts(name)[0] != "unsloth"):
            parser.error(f"no such learner: {name}; there are {', '.join(plain)}")
    return arguments


if __name__ == "__main__":
    main()
