"""Renders a config's first prompt, and notes what its chat template does that may surprise."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qwen3_distill.config import RunConfig, TaskPrompts
from qwen3_distill.data.prompt_view import (
    NamedToken,
    PromptView,
    end_of_turn,
    name_token,
    view_prompt,
    without_effect,
)
from qwen3_distill.data.prompts import PromptStream, PromptTooLong, check_roles
from qwen3_distill.data.sources import FixedSource, PromptSource, build_source
from qwen3_distill.modeling.loading import load_identity, load_tokenizer
from qwen3_distill.pipeline.assembly.data import build_context
from qwen3_distill.pipeline.parts import TextTools


def first_prompt(config: RunConfig, text: TextTools) -> PromptView:
    """Render the first training prompt as a run does, and describe it.

    Raises:
        ConfigError: the chat template does not take `student.template_arguments`.
        DataError: the prompt cannot be read or rendered, does not fit the context, or has a message
            that the chat template leaves out.
    """
    identity = load_identity(config.student.model, weights=False)
    arguments = config.student.template_arguments

    def stream(source: PromptSource) -> PromptStream:
        return PromptStream(
            source,
            text.tokenizer,
            seed=config.seed,
            context_length=identity.context_length,
            max_new_tokens=config.sampling.max_new_tokens,
            template_arguments=arguments,
            context=build_context(config.student, config.only_teacher),
        )

    teacher = config.only_teacher
    told = None if teacher is None else teacher.context
    try:
        first = build_source(config.prompts.model_copy(update={"limit": 1}), told)
        (prompt,) = stream(first).take(0, 1)
    except PromptTooLong:
        if isinstance(config.prompts, TaskPrompts) or config.prompts.too_long != "drop":
            raise
        kept = stream(build_source(config.prompts, told))
        kept.drop_too_long()
        first = FixedSource([kept.source.get(0)])
        (prompt,) = stream(first).take(0, 1)
    check_roles(first.get(0), text.tokenizer, arguments)
    return view_prompt(
        text.tokenizer,
        prompt.prompt_id,
        prompt.token_ids.tolist(),
        template_arguments=arguments,
        eos_ids=identity.eos_ids,
        teacher_ids=None if prompt.teacher_ids is None else prompt.teacher_ids.tolist(),
    )


def template_notes(config: RunConfig, text: TextTools) -> list[str]:
    """List what the chat template does that a user may not expect, each with what to change."""
    return [*_ineffective_arguments(config, text), *unended_turns(config)]


def prompt_record(view: PromptView, special_tokens: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the content of ``prompt.json``.

    Args:
        special_tokens: the student's special tokens, each with the teacher's; None: they are the
            same.
    """
    mapped = [["special token, and the teacher's", line] for line in special_tokens or ()]
    return {
        "prompt_id": view.prompt_id,
        "pieces": [list(piece) for piece in view.pieces],
        "facts": [*([*fact] for fact in view.facts()), *mapped],
        "num_tokens": view.num_tokens,
        "thinking": view.thinking,
        "end_of_turn": None if view.end_of_turn is None else asdict(view.end_of_turn),
        "end_tokens": [asdict(token) for token in view.end_tokens],
        **({} if view.teacher_text is None else {"teacher_text": view.teacher_text}),
    }


def _ineffective_arguments(config: RunConfig, text: TextTools) -> list[str]:
    arguments = config.student.template_arguments
    if not arguments:
        return []
    source = build_source(config.prompts.model_copy(update={"limit": 1}))
    messages = [
        {"role": message.role, "content": message.content} for message in source.get(0).messages
    ]
    return [
        f"student.template_arguments: {name}={arguments[name]!r} changes nothing in the first "
        "prompt: the chat template renders the same text without it"
        for name in without_effect(text.tokenizer, messages, arguments)
    ]


def unended_turns(config: RunConfig) -> list[str]:
    """Note the models whose template ends a turn with a token that ends no rollout."""
    models = {"student": config.student.model}
    models |= {teacher.role: teacher.section.model for teacher in config.teachers}
    found: dict[tuple[NamedToken | None, frozenset[int], str], list[str]] = {}
    for who, model in models.items():
        tokenizer = load_tokenizer(model, weights=False)
        eos_ids = load_identity(model, weights=False).eos_ids
        end = end_of_turn(tokenizer, config.student.template_arguments)
        if end is None or eos_ids & set(end.token_ids):
            continue
        ending = ", ".join(str(name_token(tokenizer, token_id)) for token_id in sorted(eos_ids))
        found.setdefault((end.token, eos_ids, ending), []).append(who)
    return [
        _unended_turn(token, eos_ids, ending, [f"the {who} ({models[who]})" for who in whose])
        for (token, eos_ids, ending), whose in found.items()
    ]


def _unended_turn(
    token: NamedToken | None, eos_ids: frozenset[int], ending: str, whose: list[str]
) -> str:
    models = " and ".join(whose)
    if token is None:
        return (
            f"the chat template of {models} writes nothing after an assistant's turn: it shows a "
            f"model no end of a response. A rollout ends at {ending} or at "
            "sampling.max_new_tokens"
        )
    return (
        f"the chat template of {models} ends an assistant's turn with {token}, which does not end "
        f"a rollout; only {ending} does. A model that ends its turn goes on to "
        "sampling.max_new_tokens. To change that, set eos_token_id to "
        f"{sorted({*eos_ids, token.token_id})} in generation_config.json of both models"
    )
