"""Prepares rollouts for the report: every token gets a colour by its teacher-student gap."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypeVar

from qwen3_distill.errors import AlignmentError

GAP_EDGES_NATS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Gaps at which a token's colour gets stronger. Uneven: most gaps are small, a few huge."""
ROLLOUTS_PER_STEP = 4
TOKENS_PER_ROLLOUT = 800

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutView:
    """One response with the teacher's and the sampler's logprob of every token.

    Raises:
        AlignmentError: the numbers of tokens and logprobs differ.
    """

    step: int
    """Optimizer step that consumed it."""
    rollout_id: str
    prompt_text: str
    tokens: tuple[str, ...]
    """Text of each response token."""
    behavior_logprobs: Sequence[float]
    """Nats, under the distribution that was sampled from."""
    teacher_logprobs: Sequence[float] | None
    """Nats; None: no teacher scored it."""
    sampled_by: Literal["student", "teacher"] = "student"
    """The model whose logprobs `behavior_logprobs` are."""
    finish_reason: str
    correct: float | None
    """The verifier's result, a bool or a reward in [0, 1]; None without a verifier."""

    def __post_init__(self) -> None:
        teacher = self.behavior_logprobs if self.teacher_logprobs is None else self.teacher_logprobs
        lengths = {len(self.tokens), len(self.behavior_logprobs), len(teacher)}
        if len(lengths) != 1:
            raise AlignmentError(
                f"rollout {self.rollout_id}: {len(self.tokens)} tokens, "
                f"{len(self.behavior_logprobs)} behavior and {len(teacher)} teacher "
                "logprobs; expected one of each per token"
            )

    @property
    def gaps(self) -> list[float]:
        """log teacher - log student per token, in nats: negative where the teacher disagrees.

        Empty where the student did not sample, or no teacher scored: there is no gap between them.
        """
        if self.teacher_logprobs is None or self.sampled_by == "teacher":
            return []
        pairs = zip(self.teacher_logprobs, self.behavior_logprobs, strict=True)
        return [float(teacher) - float(behavior) for teacher, behavior in pairs]


@dataclass(frozen=True)
class _Token:
    css: str
    text: str
    hover: str
    breaks: int
    """Line breaks to draw after it."""


@dataclass(frozen=True)
class RolloutCard:
    """A rollout as texts for the page, not yet escaped."""

    rollout_id: str
    prompt: str
    tokens: Sequence[_Token]
    hidden_tokens: int
    num_tokens: int
    mean_gap: str
    finish_reason: str
    verdict: Literal["correct", "wrong", "partly", "unchecked"]
    verdict_text: str


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one step; the numbers count all of them, shown or not."""

    step: int
    label: str
    total: int
    mean_gap: str
    solved: str
    cards: Sequence[RolloutCard]


def gap_class(gap_nats: float) -> str:
    """CSS class of a token: ``n1`` to ``n5`` below zero, ``p1`` to ``p5`` above, ``z`` between."""
    level = sum(abs(gap_nats) >= edge for edge in GAP_EDGES_NATS)
    if level == 0:
        return "z"
    return f"{'p' if gap_nats > 0 else 'n'}{level}"


def visible(token: str) -> str:
    """``token`` with marks in place of invisible characters and those that affect the page."""
    return "".join(map(_visible_character, token)) or "∅"


def _visible_character(character: str) -> str:
    if character in "\n\t\r":
        return {"\n": "↵", "\t": "⇥", "\r": "␍"}[character]
    if character in "\u200c\u200d":  # joiners: some scripts and emoji need them
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    # Controls, direction overrides, surrogates, separators: shown by number, never obeyed.
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return f"\\u{{{code:x}}}"
    return character


def readable(prompt: str) -> str:
    """A prompt with line breaks and tabs unchanged, and all other characters as `visible`."""
    return "".join(c if c in "\n\t" else _visible_character(c) for c in prompt)


_Saved = TypeVar("_Saved")


def shown_steps(saved: Sequence[_Saved]) -> list[_Saved]:
    """Choose the first, a middle and the last of the saved steps, which are in order."""
    places = {0, len(saved) // 2, len(saved) - 1} if saved else set[int]()
    return [saved[place] for place in sorted(places)]


def rollout_groups(rollouts: Sequence[RolloutView]) -> list[RolloutGroup]:
    """The rollouts of the first, a middle and the last saved step, in order."""
    by_step: dict[int, list[RolloutView]] = {}
    for rollout in rollouts:
        by_step.setdefault(rollout.step, []).append(rollout)
    steps = sorted(by_step)
    if not steps:
        return []
    chosen = dict(zip(shown_steps(steps), ("early", "middle", "late"), strict=False))
    chosen[steps[-1]] = "late"
    return [
        _rollout_group(step, label if len(steps) > 1 else "only saved step", by_step[step])
        for step, label in sorted(chosen.items())
    ]


def _rollout_group(step: int, label: str, rollouts: Sequence[RolloutView]) -> RolloutGroup:
    gaps = [gap for rollout in rollouts for gap in rollout.gaps]
    checked = [rollout.correct for rollout in rollouts if rollout.correct is not None]
    return RolloutGroup(
        step=step,
        label=label,
        total=len(rollouts),
        mean_gap=_signed(fmean(gaps)) if gaps else "",
        solved=_solved(checked),
        cards=[_card(rollout) for rollout in rollouts[:ROLLOUTS_PER_STEP]],
    )


def _solved(checked: Sequence[float]) -> str:
    if not checked:
        return ""
    if all(reward in (0, 1) for reward in checked):
        return f"{int(sum(checked))} of {len(checked)} correct"
    return f"mean reward {fmean(checked):.2f}"


def _card(rollout: RolloutView) -> RolloutCard:
    gaps = rollout.gaps
    shown = slice(TOKENS_PER_ROLLOUT)
    if gaps and rollout.teacher_logprobs is not None:
        logprobs = zip(rollout.behavior_logprobs, rollout.teacher_logprobs, gaps, strict=True)
        parts = zip(rollout.tokens[shown], list(logprobs)[shown], strict=True)
        tokens = [_token(text, *values) for text, values in parts]
    else:
        parts = zip(rollout.tokens[shown], rollout.behavior_logprobs[shown], strict=True)
        tokens = [_plain_token(text, rollout.sampled_by, logprob) for text, logprob in parts]
    verdict, verdict_text = _verdict(rollout.correct)
    return RolloutCard(
        rollout_id=rollout.rollout_id,
        prompt=readable(rollout.prompt_text),
        tokens=tokens,
        hidden_tokens=max(0, len(rollout.tokens) - TOKENS_PER_ROLLOUT),
        num_tokens=len(rollout.tokens),
        mean_gap=_signed(fmean(gaps)) if gaps else "",
        finish_reason=rollout.finish_reason,
        verdict=verdict,
        verdict_text=verdict_text,
    )


def _verdict(
    reward: float | None,
) -> tuple[Literal["correct", "wrong", "partly", "unchecked"], str]:
    if reward is None:
        return "unchecked", "not checked"
    if reward in (0, 1):
        return ("correct", "✓ correct") if reward else ("wrong", "✗ wrong")
    return "partly", f"reward {reward:.2f}"


def _token(token: str, behavior: float, teacher: float, gap: float) -> _Token:
    shown = visible(token)
    return _Token(
        css=gap_class(gap),
        text=shown,
        hover=f"“{shown}”\nstudent {_signed(behavior)}\nteacher {_signed(teacher)}\n"
        f"gap {_signed(gap)} nats",
        breaks=token.count("\n"),
    )


def _plain_token(token: str, sampled_by: str, behavior: float) -> _Token:
    """A token without a gap between student and teacher."""
    shown = visible(token)
    return _Token(
        css=gap_class(0.0),
        text=shown,
        hover=f"“{shown}”\nsampled by the {sampled_by}, {_signed(behavior)} nats",
        breaks=token.count("\n"),
    )


def _signed(nats: float) -> str:
    shown = round(nats, 2) + 0.0  # adding 0 turns -0.0 into 0.0
    return f"{shown:+.2f}".replace("-", _MINUS)


def gap_legend() -> list[tuple[str, str]]:
    """(class, label) from the most negative to the most positive colour."""
    edges = [f"{edge:g}" for edge in GAP_EDGES_NATS]
    negative = [(f"n{level}", f"{_MINUS}{edges[level - 1]}") for level in range(len(edges), 0, -1)]
    positive = [(f"p{level}", f"+{edges[level - 1]}") for level in range(1, len(edges) + 1)]
    return [*negative, ("z", "0"), *positive]
