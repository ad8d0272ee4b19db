"""Finds problems that are both trained on and evaluated on."""

import unicodedata
from dataclasses import dataclass

from qwen3_distill.data.sources import PromptSource, RawPrompt


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Held-out problems whose text is also a training prompt's."""

    num_shared: int
    num_held_out: int
    held_out_id: str
    """The first of them."""
    training_id: str
    """The training prompt of the same text."""

    def __str__(self) -> str:
        return (
            f"{self.num_shared} of {self.num_held_out} held-out problems are also training "
            f"prompts, e.g. {self.held_out_id} is {self.training_id}: the accuracy on them is not "
            "held out; remove them from the one or the other"
        )


def find_overlap(
    training: PromptSource,
    held_out: PromptSource,
    *,
    num_problems: int,
    training_suffix: str = "",
    held_out_suffix: str = "",
) -> Overlap | None:
    """Compare the user messages of two sources; None if no problem is shared or one is endless.

    Texts are equal after Unicode normalisation (NFKC), without regard to case, white space and the
    suffixes that the config appends. Answers and system messages do not count.

    Args:
        num_problems: how many held-out problems are evaluated, from the first on.
    """
    if training.num_prompts is None or held_out.num_prompts is None:
        return None
    count = min(num_problems, held_out.num_prompts)
    wanted: dict[str, list[str]] = {}
    for index in range(count):
        raw = held_out.get(index)
        wanted.setdefault(_text(raw, held_out_suffix), []).append(raw.prompt_id)
    found: dict[str, str] = {}
    for index in range(training.num_prompts):
        raw = training.get(index)
        text = _text(raw, training_suffix)
        if text in wanted:
            found.setdefault(text, raw.prompt_id)
    for text, held_out_ids in wanted.items():
        if text in found:
            return Overlap(
                num_shared=sum(len(wanted[shared]) for shared in found),
                num_held_out=count,
                held_out_id=held_out_ids[0],
                training_id=found[text],
            )
    return None


def _text(raw: RawPrompt, suffix: str) -> str:
    texts = [message.content for message in raw.messages if message.role == "user"]
    texts[-1] = texts[-1].removesuffix(suffix)
    return " ".join(unicodedata.normalize("NFKC", "\n".join(texts)).casefold().split())
