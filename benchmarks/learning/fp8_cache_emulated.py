"""Emulates a key-value cache in FP8 in a large random model: how far do logprobs move?

    python scripts/make_shape_model.py --shape 4B models/random-4B --device cpu
    python -m benchmarks.learning.fp8_cache_emulated --model models/random-4B

Everything is computed in float32, a layer's weights at a time, so the model need not fit in memory
in float32. Rows of random tokens pass through the model exactly, then with rounding; the figures
are means of the sizes of differences, in nats, over one token sampled at each place behind the
first ``--prompt-tokens``:

- ``keys_values``: keys and values in float8 (e4m3, no scale) as a decode step with queries in
  bfloat16 reads them, against nothing rounded: what `health/learner_vs_engine_abs_nats` should say
- ``queries_beyond``: queries too, as FlashInfer has them for prompts on Hopper, against
  ``keys_values``: what `speed.decode_profile --check` should say
- ``probabilities_beyond``: the probabilities of attention too, likewise
- ``bfloat16``: hidden states between layers in bfloat16, nothing else rounded

The card's own are in `h200_levers_n4` and `h200_decode_check`.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmarks.lib.common import RESULTS, Report

_NAME = "qwen3_distill_rounded"
CASES = ("exact", "bfloat16", "keys_values", "queries", "probabilities")
"""From `keys_values` on each rounds what the one before rounds, and more."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_HEAD_ROWS = 16_384


def in_float8(values: Tensor) -> Tensor:
    """Round to float8, as a cache without scales does: what is too large is cut."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(values.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, case: str) -> Tensor:
    """Return [B, H, T, D]: causal attention of [B, H, T, D] with [B, G, T, D], rounded."""
    rounded = CASES.index(case) - CASES.index("keys_values")
    if rounded >= 0:
        key, value = in_float8(key), in_float8(value)
    if rounded >= 1:
        query = in_float8(query)
    of_one = query.shape[1] // key.shape[1]
    key, value = (values.repeat_interleave(of_one, dim=1) for values in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    # As the kernels do: divided by the sum at the end, and the largest is 1.
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return (in_float8(weights) if rounded >= 2 else weights) @ value / total


class Passes:
    """Passes of some rows of tokens through a model.

    The attention is registered by name, once in a process: a second one takes it over.
    """

    def __init__(self, model: Any, ids_BT: Tensor, prompt_tokens: int) -> None:
        self._model, self._ids_BT, self._prompt_tokens = model, ids_BT, prompt_tokens
        self._case = "exact"
        AttentionInterface.register(_NAME, self._forward)
        model.config._attn_implementation = _NAME

    def _forward(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        out_BHTD = attend(query, key, value, options["scaling"], self._case)
        return out_BHTD.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def logprobs(self, case: str) -> Tensor:
        """Return [N, V] in float32, at every place behind the prompts."""
        self._case, inner = case, self._model.model
        hidden = inner.embed_tokens(self._ids_BT).float()
        places = torch.arange(self._ids_BT.shape[1])[None]
        rotations = inner.rotary_emb(hidden, places)
        for layer in self._in_float32(inner.layers):
            out = layer(hidden, position_embeddings=rotations, attention_mask=None)
            hidden = out[0] if isinstance(out, tuple) else out
            if case == "bfloat16":
                hidden = hidden.bfloat16().float()
        (norm,) = self._in_float32([inner.norm])
        hidden_ND = norm(hidden)[:, self._prompt_tokens :].flatten(0, 1)
        rows = self._model.lm_head.weight.split(_HEAD_ROWS)
        return torch.cat([hidden_ND @ part.float().T for part in rows], dim=-1).log_softmax(dim=-1)

    @staticmethod
    def _in_float32(modules: Any) -> Iterator[Any]:
        for module in modules:
            yield copy.deepcopy(module).float()


def measure(passes: Passes, report: Report) -> None:
    sampled = torch.empty(0)
    of_case = dict[str, Tensor]()
    for case in CASES:
        began = time.perf_counter()
        logprobs_NV = passes.logprobs(case)
        if case == "exact":
            sampled = logprobs_NV.exp().multinomial(1)
        of_case[case] = logprobs_NV.gather(1, sampled)
        after = {"queries": "keys_values", "probabilities": "keys_values"}.get(case, "exact")
        gap = (of_case[case] - of_case[after]).abs()
        name = f"{case}_beyond" if after != "exact" else case
        figures = {} if case == "exact" else {f"{name}_nats": float(gap.mean())}
        seconds = time.perf_counter() - began
        report.add(
            case, figures, against=after, largest_nats=float(gap.max()), tokens=len(gap), s=seconds
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--name", default="fp8_cache_emulated", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    size = (arguments.rows, arguments.prompt_tokens + arguments.new_tokens)
    passes = Passes(model, torch.randint(model.config.vocab_size, size), arguments.prompt_tokens)
    measure(passes, Report(arguments.name, arguments.results))


if __name__ == "__main__":
    main()
