"""Checks whether prompts can be read, rendered, answered within the limits, and judged."""

import os
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from qwen3_distill.config import (
    JsonlPrompts,
    ParquetPrompts,
    PromptsConfig,
    RunConfig,
    SamplingConfig,
    VerifierConfig,
)
from qwen3_distill.data.prompts import PromptStream
from qwen3_distill.data.rollout_files import read_training
from qwen3_distill.data.sources import PromptSource, RawPrompt, build_source
from qwen3_distill.data.sources.records import ANSWER_KEY
from qwen3_distill.data.verifiers import build_verifier, check_references
from qwen3_distill.pipeline.assembly.data import build_stream, overlap_of
from qwen3_distill.pipeline.assembly.machine_checks import sequence_limits, server_limits
from qwen3_distill.pipeline.finding import Check, Verdict, bad, doubtful, good, skipped
from qwen3_distill.pipeline.model_checks import identity_of
from qwen3_distill.pipeline.parts import TextTools
from qwen3_distill.scoring.by_tag import required_tag
from qwen3_distill.training.objectives.base import check_samplers
from qwen3_distill.types import Prompt

SAMPLE = 256
"""Prompts that are looked at one by one."""
_ANSWERS = (
    "{}",
    "\\boxed{{{}}}",
    "The answer is {}.",
    "answer: {}",
    "#### {}",
    "<answer>{}</answer>",
)
"""Responses that consist of the reference answer; a verifier takes at least one of them."""
_READS_PLAIN_ANSWERS = {"math", "exact", "choice"}
"""Verifiers that must take one of `_ANSWERS`; a pattern or a function may ask for another form."""
_FEW_DISTINCT = 0.5


def check_training_prompts(config: RunConfig) -> Verdict:
    """Open the training prompts.

    Raises:
        DataError: they cannot be read.
    """
    return _opened(config.prompts)


def check_training_file(config: RunConfig) -> Verdict:
    """Check that the file of the training prompts exists, without reading it.

    Raises:
        DataError: it does not.
    """
    prompts = config.prompts
    if isinstance(prompts, JsonlPrompts | ParquetPrompts) and not os.path.exists(prompts.path):
        build_source(prompts)
    return good("there")


def check_held_out(config: RunConfig) -> Verdict:
    """Open the held-out problems.

    Raises:
        DataError: they cannot be read.
    """
    if config.evaluation is None:
        return skipped("the run is not evaluated")
    return _opened(config.evaluation.prompts)


def check_rollouts_file(config: RunConfig) -> Verdict:
    """Read the rollouts of `rollouts.file`, and see that the objective learns from them.

    Raises:
        DataError: they cannot be read, are of another vocabulary, or of another sampler.
    """
    if (file := config.rollouts.file) is None:
        return skipped("the run samples its rollouts")
    vocab_size = identity_of(config.student.model).vocab_size
    rows = [item for _, item in read_training(file, vocab_size=vocab_size)]
    if not rows:
        return bad(f"{file} has no rollouts to train on", "give another rollouts.file")
    check_samplers(config.objective, rows)
    if config.tags and config.objective.score_request is not None:
        known = dict.fromkeys(config.tags)
        for item in rows:
            required_tag(item.rollout.prompt, known, f"{file}: rollout {item.rollout.rollout_id}")
    return good(f"{len(rows):,} rollouts")


def _opened(prompts: PromptsConfig) -> Verdict:
    source = build_source(prompts)
    count = source.num_prompts
    found = "endless" if count is None else f"{count:,} prompts"
    if source.notes:
        return doubtful(f"{found}; {source.notes[0]}", "see that this is meant")
    return good(found)


def check_reference_answers(config: RunConfig) -> Verdict:
    """Check all reference answers, and let the verifier judge some of them.

    Raises:
        DataError: a row has none that the verifier takes.
    """
    judged: list[str] = []
    for name, verifier, prompts in _verified(config):
        source = build_source(prompts)
        check_references(verifier, source)
        if verifier.kind == "task":
            judged.append(f"{name}: the task's own")
            continue
        taken, asked = _smoke(verifier, source)
        if asked and not taken:
            tell = bad if verifier.kind in _READS_PLAIN_ANSWERS else doubtful
            return tell(
                f"{name}: the verifier takes none of {asked} reference answers, in no phrasing",
                f"see that {name}.kind={verifier.kind} fits the answers in answer_field "
                "(docs/guide/verifiers.md)",
            )
        judged.append(f"{name}: {taken} of {asked} sampled references are taken as an answer")
    return good("; ".join(judged)) if judged else skipped("the config has no verifier")


def _verified(config: RunConfig) -> Iterator[tuple[str, VerifierConfig, PromptsConfig]]:
    if config.verifier is not None:
        yield "verifier", config.verifier, config.prompts
    if config.evaluation is not None:
        yield "evaluation.verifier", config.evaluation.verifier, config.evaluation.prompts


def _smoke(config: VerifierConfig, source: PromptSource) -> tuple[int, int]:
    """Return how many of how many sampled references the verifier takes in some phrasing."""
    verifier = build_verifier(config)
    rows = [raw for raw in _sampled(source, 8) if ANSWER_KEY in raw.task_data]
    taken = 0
    for raw in rows:
        prompt = Prompt(prompt_id=raw.prompt_id, token_ids=_ONE_TOKEN, task_data=raw.task_data)
        answers = (form.format(raw.task_data[ANSWER_KEY]) for form in _ANSWERS)
        taken += any(verifier.correct(prompt, text) > 0 for text in answers)
    return taken, len(rows)


_ONE_TOKEN: Any = [0]


def check_lengths(config: RunConfig) -> Verdict:
    """Render the prompts and compare their lengths with all limits.

    Raises:
        DataError: a prompt cannot be rendered, or does not fit the student's context.
    """
    text = TextTools(config.student.model)
    longest = read_by_teacher = 0
    parts: list[str] = []
    for name, prompts, sampling in _sampled_from(config):
        told = config.only_teacher if prompts is config.prompts else None
        stream = build_stream(config.student, prompts, text, sampling, seed=0, scoring=told)
        stream.check()
        lengths = _lengths(stream)
        longest = max(longest, max(lengths) + sampling.max_new_tokens)
        if name == "prompts" or (config.evaluation is not None and config.evaluation.teacher):
            read_by_teacher = longest
        parts.append(
            f"{name} of {statistics.median(lengths):.0f} tokens (at most {max(lengths)} of "
            f"{len(lengths)}) and answers of {sampling.max_new_tokens}"
        )
    found = ", ".join(parts)
    limits = {name: (limit, longest) for name, limit in _limits(config).items()}
    limits |= {name: (limit, read_by_teacher) for name, limit in server_limits(config).items()}
    short = {name: both for name, both in limits.items() if both[0] < both[1]}
    if short:
        name, (limit, needed) = min(short.items(), key=lambda item: item[1])
        return bad(
            f"{found}: {needed} tokens together, {name} is {limit}",
            f"raise {name} to {needed} or more, or lower sampling.max_new_tokens",
        )
    planned = config.planning.prompt_tokens
    limit = config.sampling.max_new_tokens
    if longest > 2 * (planned + limit):
        return doubtful(
            f"{found}; the memory is planned for prompts of {planned}",
            "raise planning.prompt_tokens, or fewer rollouts run together than planned",
        )
    return good(found)


def _sampled_from(config: RunConfig) -> Iterator[tuple[str, PromptsConfig, SamplingConfig]]:
    yield "prompts", config.prompts, config.sampling
    if (evaluation := config.evaluation) is not None:
        yield "held-out problems", evaluation.prompts, evaluation.sampling


def _lengths(stream: PromptStream) -> list[int]:
    """Return tokens of the prompts: of all in a small source, of the first of a large one."""
    count = stream.source.num_prompts
    prompts = stream.take(0, SAMPLE if count is None else min(count, SAMPLE))
    return [int(prompt.token_ids.size) for prompt in prompts]


def _limits(config: RunConfig) -> Mapping[str, int]:
    """Return the limits on prompt plus response, by setting; a model's context among them."""
    contexts = {"the student's context": identity_of(config.student.model).context_length}
    for teacher in config.teachers:
        whose = (
            f"the context of teacher {teacher.name}" if teacher.name else "the teacher's context"
        )
        contexts[whose] = identity_of(teacher.section.model).context_length
    return sequence_limits(config) | contexts


def check_spread(config: RunConfig) -> Verdict:
    """Look for prompts that occur twice, and for training prompts that are held-out problems.

    Raises:
        DataError: they cannot be read.
    """
    source = build_source(config.prompts)
    rows = list(_sampled(source, SAMPLE))
    texts = {tuple(message.content for message in raw.messages) for raw in rows}
    found = f"{len(texts)} distinct of {len(rows)} sampled prompts"
    answers = {raw.task_data[ANSWER_KEY] for raw in rows if ANSWER_KEY in raw.task_data}
    if answers:
        found += f", {len(answers)} distinct answers"
    if config.evaluation is not None:
        overlap = overlap_of(config, source, build_source(config.evaluation.prompts))
        if overlap is not None:
            return doubtful(f"{found}; {overlap}", "take held-out problems from another file")
    if len(rows) > 1 and len(texts) < _FEW_DISTINCT * len(rows):
        return doubtful(found, "remove repeated rows: each is trained on once per copy")
    if len(rows) < config.prompts_per_step:
        return doubtful(
            f"{found}, and a step takes {config.prompts_per_step}",
            "give more prompts, or lower prompts_per_step",
        )
    return good(found)


def _sampled(source: PromptSource, count: int) -> Iterator[RawPrompt]:
    """Yield prompts spread over a source."""
    total = source.num_prompts
    if total is None:
        yield from (source.get(index) for index in range(count))
        return
    step = max(1, total // count)
    yield from (source.get(index) for index in range(0, total, step)[:count])


_NEEDS = ("student files", "teacher files", "training prompts", "held-out problems")
DATA_CHECKS = (
    Check(
        name="training prompts",
        find=check_training_prompts,
        reads_prompts=True,
        refuses_run=True,
    ),
    Check(name="held-out problems", find=check_held_out, refuses_run=True),
    Check(
        name="rollouts file",
        find=check_rollouts_file,
        needs=("student files",),
        refuses_run=True,
    ),
    Check(
        name="reference answers",
        find=check_reference_answers,
        needs=("training prompts", "held-out problems"),
        reads_prompts=True,
        refuses_run=True,
    ),
    Check(
        name="prompt and answer lengths",
        find=check_lengths,
        needs=_NEEDS,
        reads_prompts=True,
    ),
    Check(
        name="spread of prompts",
        find=check_spread,
        needs=("training prompts", "held-out problems"),
        reads_prompts=True,
    ),
)
TRAINING_FILE = Check(name="training prompts", find=check_training_file, refuses_run=True)
