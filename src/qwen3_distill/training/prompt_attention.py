"""Attention over packed rows in which a prompt stands once before all of its answers.

The prompt's tokens attend to one another; an answer's tokens to the prompt and to their own answer.
Keys and values of a prompt are computed once, and its gradient is the sum over its answers. The
hidden states are those of a sequence by itself, but for the order of sums. Sequences packed without
a prompt in common are prompts without answers.

There are three ways, of which the first that is possible is taken; in layers that unsloth compiles
on CUDA the second always, which a compiler can follow:

- all prompts and answers of the row have the same lengths: attention over whole sequences, as
  without packing, with a prompt's keys repeated for its answers (on an H200 cuDNN's kernel, which
  is faster than the flash kernel by more than the repeated prompts cost);
- on CUDA in 16 bits: one launch for the row (`flash_rows`);
- else two calls for each prompt.

Shape letters: A tokens of the longest answer behind a prompt, B sequences, M answers, P prompt
tokens, T places of the row, H heads, G heads of keys and values, D dimensions of a head.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from qwen3_distill.errors import ConfigError
from qwen3_distill.modeling.host_to_device import to_device
from qwen3_distill.training.batching import SharedPrompt
from qwen3_distill.training.flash_rows import FlashRow, flash_row, flash_runs

_NAME = "qwen3_distill_shared_prompts"
_WHOLE_ADVANTAGE = 1.5
"""How much faster attention over whole sequences of one length is than the flash kernel's, for a
pair of tokens: 0.78 against 1.18 ms of a layer on an H200."""
_CUDNN_LENGTHS = 128
"""On CUDA whole sequences are padded to a multiple of this: cuDNN makes a plan for every length."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A prompt and its answers, as places of the row."""

    start: int
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    gather_MA: Tensor | None
    """int64: place behind the prompt of each answer's tokens, padded with 0; None: all are equally
    long."""
    valid_T: Tensor | None
    """int64: where in the flattened [M, A] each token stands; None likewise."""

    @property
    def longest(self) -> int:
        return max(self.answer_tokens)


_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""From the fastest to the one that can do everything."""


class PromptAttention:
    """Where the prompts and answers of one micro-batch stand, on its device; for all layers."""

    def __init__(self, shared: Sequence[SharedPrompt], device: torch.device) -> None:
        self._shared, self._device = shared, device
        self._alike = _alike(shared)

    @cached_property
    def _flash(self) -> FlashRow:
        return flash_row(self._shared, self._device)

    def one_launch(self, dtype: torch.dtype, head_size: int) -> FlashRow | None:
        """Return the row for attention of this dtype in one launch, which a compiler can follow.

        None: no kernel computes it on this device.
        """
        return self._flash if flash_runs(self._device, dtype, head_size) else None

    @cached_property
    def _groups(self) -> list[_Group]:
        return [_place(group, self._device) for group in self._shared]

    def __call__(
        self, query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, **options: Any
    ) -> Tensor:
        """Return [H, T, D], the attention's output at every place of the row.

        Args:
            options: ``scale`` and ``dropout_p`` of `scaled_dot_product_attention`.
        """
        options["enable_gqa"] = query_HTD.shape[0] != key_GTD.shape[0]
        if self._alike is not None:
            multiple = _CUDNN_LENGTHS if query_HTD.is_cuda else 1
            return _attend_alike(self._alike, (query_HTD, key_GTD, value_GTD), options, multiple)
        head_size = query_HTD.shape[-1]
        row = self.one_launch(query_HTD.dtype, head_size)
        if row is not None and not options.get("dropout_p"):
            scale = options.get("scale") or head_size**-0.5
            return row.attend(query_HTD, key_GTD, value_GTD, scale)
        parts = list[Tensor]()
        for group in self._groups:
            parts.extend(_attend(group, query_HTD, key_GTD, value_GTD, options))
        return torch.cat(parts, dim=1)


def without_answers(lengths: Sequence[int]) -> list[SharedPrompt]:
    """Return sequences that are packed one behind another as prompts without answers."""
    starts = accumulate(lengths, initial=0)
    return [
        SharedPrompt(start=start, prompt_tokens=tokens, answer_tokens=())
        for start, tokens in zip(starts, lengths, strict=False)
    ]


def share_prompts(model: PreTrainedModel) -> None:
    """Have a Qwen3 model attend as the `PromptAttention` says that its forward pass is given.

    Without one it attends as before, with PyTorch's attention.

    Raises:
        ConfigError: some of its layers attend to a window only.
    """
    if "sliding_attention" in model.config.layer_types:
        raise ConfigError(
            "training.shared_prompts: layers of the student attend to a sliding window, which "
            "answers behind a shared prompt do not have; set training.shared_prompts=false"
        )
    AttentionInterface.register(_NAME, _attention_forward)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = _NAME


def hidden_states(
    model: PreTrainedModel, input_1T: Tensor, position_1T: Tensor, attention: PromptAttention
) -> Tensor:
    """Return [1, T, D], the hidden states of a row with shared prompts."""
    no_mask = {"full_attention": None}  # or the model would make one over the whole row
    inner: Any = model.model
    return inner(
        input_ids=input_1T,
        position_ids=position_1T,
        attention_mask=no_mask,
        use_cache=False,
        prompt_attention=attention,
    ).last_hidden_state


@torch.compiler.disable  # its shapes differ with every micro-batch
def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompt_attention: PromptAttention | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Give transformers' attention layers, [1, heads, T, D] each, the output [1, T, H, D]."""
    if prompt_attention is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    out_HTD = prompt_attention(
        query.squeeze(0), key.squeeze(0), value.squeeze(0), scale=scaling, dropout_p=dropout
    )
    return out_HTD.transpose(0, 1).unsqueeze(0).contiguous(), None


def _place(group: SharedPrompt, device: torch.device) -> _Group:
    lengths = group.answer_tokens
    gather_MA = valid_T = None
    if len(set(lengths)) > 1:
        longest = max(lengths)
        column_A = torch.arange(longest)
        length_M1 = torch.tensor(lengths).unsqueeze(1)
        start_M1 = length_M1.cumsum(dim=0) - length_M1
        is_token_MA = column_A < length_M1
        gather_MA = to_device((start_M1 + column_A).where(is_token_MA, 0), device)
        valid_T = to_device(is_token_MA.flatten().nonzero().squeeze(1), device)
    return _Group(
        start=group.start,
        prompt_tokens=group.prompt_tokens,
        answer_tokens=lengths,
        gather_MA=gather_MA,
        valid_T=valid_T,
    )


@dataclass(frozen=True, kw_only=True)
class _Alike:
    """Prompts of one length, each with as many answers of one length."""

    prompt_tokens: int
    answers: int
    """0: sequences without a prompt in common, which count as prompts."""
    answer_tokens: int


def _alike(shared: Sequence[SharedPrompt]) -> _Alike | None:
    """Return the lengths that all have; None: they differ, or repeated prompts cost too much."""
    first = shared[0]
    lengths = first.answer_tokens
    same = len(set(lengths)) <= 1 and all(
        (group.prompt_tokens, group.answer_tokens) == (first.prompt_tokens, lengths)
        for group in shared
    )
    if not same:
        return None
    prompt, answers = first.prompt_tokens, len(lengths)
    answer = lengths[0] if lengths else 0
    # Twice the pairs of tokens, of whole sequences and with the prompt once.
    whole = max(answers, 1) * (prompt + answer) ** 2
    once = prompt**2 + answers * answer * (2 * prompt + answer)
    if whole > _WHOLE_ADVANTAGE * once:
        return None
    return _Alike(prompt_tokens=prompt, answers=answers, answer_tokens=answer)


def _attend_alike(
    alike: _Alike, of_row: Sequence[Tensor], options: dict[str, Any], multiple: int
) -> Tensor:
    """Return [H, T, D]: attention over every answer with its prompt before it.

    Args:
        of_row: queries [H, T, D], keys and values [G, T, D].
        multiple: sequences are padded to a multiple of this length.
    """
    padding = -(alike.prompt_tokens + alike.answer_tokens) % multiple
    query, key, value = (_whole_sequences(alike, values, padding) for values in of_row)
    # `resolve_device` turns cuDNN's kernel off, because lengths hardly ever repeat: here they do.
    with sdpa_kernel(_KERNELS, set_priority=True) if query.is_cuda else nullcontext():
        out_BHTD = scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    size = alike.prompt_tokens + alike.answer_tokens
    out_BTHD = out_BHTD.transpose(1, 2)[:, :size]
    if alike.answers > 1:
        out_CMTHD = out_BTHD.unflatten(0, (-1, alike.answers))
        prompt, answers = out_CMTHD.split([alike.prompt_tokens, alike.answer_tokens], dim=2)
        # Every answer's copy of the prompt has the same output: one of them is the prompt's.
        out_BTHD = torch.cat([prompt[:, 0], answers.flatten(1, 2)], dim=1)
    return out_BTHD.flatten(0, 1).transpose(0, 1)


def _whole_sequences(alike: _Alike, values_HTD: Tensor, padding: int) -> Tensor:
    """Return [B, heads, T, D], a row per answer with its prompt before it, padded behind."""
    answers, size = max(alike.answers, 1), alike.answer_tokens
    values_THD = values_HTD.transpose(0, 1)
    values_CTHD = values_THD.unflatten(0, (-1, alike.prompt_tokens + answers * size))
    if answers > 1:
        prompt = values_CTHD[:, None, : alike.prompt_tokens].expand(-1, answers, -1, -1, -1)
        own = values_CTHD[:, alike.prompt_tokens :].unflatten(1, (answers, size))
        values_CTHD = torch.cat([prompt, own], dim=2).flatten(0, 1)
    if padding:  # without any, `pad` would copy
        values_CTHD = pad(values_CTHD, (0, 0, 0, 0, 0, padding))
    return values_CTHD.transpose(1, 2)


def _attend(
    group: _Group,
    query_HTD: Tensor,
    key_GTD: Tensor,
    value_GTD: Tensor,
    options: dict[str, Any],
) -> list[Tensor]:
    """Return the outputs [H, ., D] of a prompt and of its answers, in the order of the row."""
    first, middle = group.start, group.start + group.prompt_tokens
    stop = middle + sum(group.answer_tokens)
    query, *prompt = (values[None, :, first:middle] for values in (query_HTD, key_GTD, value_GTD))
    parts = [
        scaled_dot_product_attention(
            query, prompt[0], prompt[1], is_causal=True, **options
        ).squeeze(0)
    ]
    if middle == stop:
        return parts
    query_MHAD, *answers = (
        _by_answer(group, values[:, middle:stop]) for values in (query_HTD, key_GTD, value_GTD)
    )
    key_MGLD, value_MGLD = (
        torch.cat([of_prompt.expand(len(of_answer), -1, -1, -1), of_answer], dim=2)
        for of_prompt, of_answer in zip(prompt, answers, strict=True)
    )
    # The last query attends to all keys, the one before to all but one: an answer's token to the
    # prompt and its own answer. Padding stands behind the tokens, and none of them looks there.
    bias = causal_lower_right(group.longest, group.prompt_tokens + group.longest)
    out_MHAD = scaled_dot_product_attention(
        query_MHAD, key_MGLD, value_MGLD, attn_mask=bias, **options
    )
    out_HTD = out_MHAD.transpose(0, 1).flatten(1, 2)
    parts.append(out_HTD if group.valid_T is None else out_HTD.index_select(1, group.valid_T))
    return parts


def _by_answer(group: _Group, values_HTD: Tensor) -> Tensor:
    """Return [M, heads, A, D], a row per answer, of values behind a prompt."""
    if group.gather_MA is None:
        rows = values_HTD.unflatten(1, (len(group.answer_tokens), group.longest))
    else:
        rows = values_HTD.index_select(1, group.gather_MA.flatten()).unflatten(
            1, group.gather_MA.shape
        )
    return rows.transpose(0, 1)
