"""Checks of a teacher with a tokenizer of its own: what its special tokens and template are."""

from qwen3_distill.config import RunConfig
from qwen3_distill.data.sources import build_source
from qwen3_distill.pipeline.assembly.views import (
    build_own_view,
    own_prompt_lengths,
    special_token_lines,
)
from qwen3_distill.pipeline.finding import Check, Verdict, bad, good, skipped


def check_special_tokens(config: RunConfig) -> Verdict:
    """List what each of the student's special tokens is to the teacher.

    Raises:
        HandshakeError: the tokenizers cannot be aligned, or a token has no counterpart.
    """
    lines = special_token_lines(config)
    if lines is None:
        return skipped("the teacher reads the student's own tokens")
    return good("; ".join(lines))


def check_teacher_prompts(config: RunConfig) -> Verdict:
    """Render some prompts with the teacher's own template, and compare with its context.

    Raises:
        DataError: it cannot render one, or leaves out a message.
    """
    view = build_own_view(config)
    if view is None:
        return skipped("the teacher reads the student's own tokens")
    lengths = own_prompt_lengths(view, build_source(config.prompts))
    longest = max(lengths)
    needed = longest + config.sampling.max_new_tokens
    found = f"{len(lengths)} prompts of at most {longest} tokens in the teacher's own template"
    if needed > view.context_length:
        return bad(
            f"{found}; with answers of {config.sampling.max_new_tokens} tokens they need {needed}, "
            f"and the teacher's context is {view.context_length}",
            "lower sampling.max_new_tokens, or shorten the prompts",
        )
    return good(found)


_NEEDS = ("student files", "teacher files", "training prompts")
TOKENIZER_CHECKS = (
    Check(
        name="special tokens",
        find=check_special_tokens,
        needs=_NEEDS[:2],
        refuses_run=True,
        remedy="name the teacher's token in scoring.special_tokens (docs/guide/teachers.md)",
    ),
    Check(
        name="teacher's prompts",
        find=check_teacher_prompts,
        needs=_NEEDS,
        refuses_run=True,
        reads_prompts=True,
    ),
)
