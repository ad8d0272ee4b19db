"""Holds public measurements on a GB10, and predicts each with the time plan's roofline.

None of them fitted a share: the shares are those of an H200, the peaks those of data sheets. The
launch times of `planning.peaks` were assumed knowing the rows without CUDA graphs, so these do not
count as held out. Left out are models that are not dense transformers with a full cache, and rows
that their own source doubts. Sources name the author, the place and the date.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qwen3_distill.modeling.shapes import ModelShape, named_shape
from qwen3_distill.planning import rates as shares
from qwen3_distill.planning.peaks import named_device
from qwen3_distill.planning.rates import EFFICIENCY, Rates, peak_rates
from qwen3_distill.planning.roofline import (
    Decoding,
    Model,
    StageTime,
    added,
    cache_reads,
    decode_step,
    prefill,
)
from qwen3_distill.planning.work import Rollouts

_NVFP4_BYTES = 0.5 + 1 / 16
"""Bytes of a weight in 4 bits with a scale of 8 bits for 16 of them."""


@dataclass(frozen=True, kw_only=True)
class PublicRow:
    """One public measurement."""

    name: str
    source: str
    tok_s: float
    model: Model
    kind: str
    """``decode`` or ``prefill``."""
    batch: int = 1
    context: int = 180
    """Cached tokens of a sequence on average."""
    eager: bool = False

    def predicted(self, rates: Rates) -> tuple[float, StageTime]:
        """Return tokens per second and where the time goes."""
        if self.kind == "prefill":
            rollouts = Rollouts(count=1, prompt_tokens=self.context, responses=(1,))
            time = _prefill(self.model, rates, rollouts)
            return self.context / time.seconds, time
        eager = shares.EAGER_KERNELS_PER_LAYER if self.eager else None
        decoding = Decoding(max_sequences=self.batch, eager_kernels=eager)
        step = decode_step(self.model, rates, decoding, self.batch)
        time = added(step, cache_reads(self.model, rates, self.batch * self.context))
        return self.batch / time.seconds, time


def _prefill(model: Model, rates: Rates, rollouts: Rollouts) -> StageTime:
    """Predict a prompt's pass; a teacher's FP8 share is scoring's."""
    time = prefill(model, rates, rollouts)
    return time.times(EFFICIENCY.prefill / EFFICIENCY.score_fp8) if model.fp8 else time


def _shape(name: str, sizes: tuple[int, ...], *, tied: bool = False) -> ModelShape:
    vocab, hidden, inner, layers, heads, kv_heads = sizes
    return ModelShape(
        name=name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        tied=tied,
        context_length=131072,
    )


_LLAMA_8B = _shape("Llama-3.1-8B", (128256, 4096, 14336, 32, 32, 8))
_LLAMA_70B = _shape("Llama-3.1-70B", (128256, 8192, 28672, 80, 64, 8))
_MINISTRAL = _shape("Ministral-8B-2410", (131072, 4096, 12288, 36, 32, 8))
_MINISTRAL_3 = _shape("Ministral-3-8B", (131072, 4096, 14336, 34, 32, 8))
_PHI = _shape("Phi-4-mini", (200064, 3072, 8192, 32, 24, 8), tied=True)
_QWEN_14B = _shape("DeepSeek-R1-Distill-Qwen-14B", (152064, 5120, 13824, 48, 40, 8))
_GRANITE = _shape("granite-4.1-8b", (100352, 4096, 12800, 40, 32, 8), tied=True)

_HEITOR = "heitor-mocelin/dgx-spark-research, raw JSON, vLLM nightly, 2026-06-07"
_LOCALAI = "LocalAI SERVER_SWEEP.md, vLLM 0.23, no CUDA graphs, 2026-06-23"
_LMSYS = "LMSYS blog repository, SGLang, 2025-10-13"
_DJANGO = "djangodevreng/dgx-spark-benchmarks, vLLM 0.26.0, 2026-08"
_LYB = "lyb.re, vLLM, 2026-03-10"
_NVIDIA = "NVIDIA blog table, TensorRT-LLM, as copied by chrislyz/A-DGX-Spark-CookBook, 2026-02"


def _bf16(shape: ModelShape, *, kv_itemsize: int | None = None) -> Model:
    return Model(shape=shape, itemsize=2, kv_itemsize=kv_itemsize)


def _fp8(shape: ModelShape) -> Model:
    return Model(shape=shape, itemsize=2, fp8=True)


def _nvfp4(shape: ModelShape) -> Model:
    return Model(shape=shape, itemsize=2, linear_bytes=int(_NVFP4_BYTES * shape.linear_parameters))


def _decode(
    name: str,
    model: Model,
    source: str,
    measured: dict[int, float],
    *,
    context: int = 180,
    eager: bool = False,
) -> Iterator[PublicRow]:
    for batch, tok_s in measured.items():
        yield PublicRow(
            name=f"{name}, {batch} sequences",
            source=source,
            tok_s=tok_s,
            model=model,
            kind="decode",
            batch=batch,
            context=context,
            eager=eager,
        )


def _prompt(
    name: str, model: Model, source: str, tok_s: float, context: int = 2048
) -> Iterator[PublicRow]:
    yield PublicRow(
        name=f"{name}, prefill of {context} tokens",
        source=source,
        tok_s=tok_s,
        model=model,
        kind="prefill",
        context=context,
    )


def public_rows() -> list[PublicRow]:
    """Return every row."""
    qwen = {size: named_shape(size) for size in ("0.6B", "4B", "8B", "14B", "32B")}
    return [
        *_decode("Qwen3-4B NVFP4", _nvfp4(qwen["4B"]), _HEITOR, {1: 63.9, 16: 950, 32: 1680}),
        *_decode("Qwen3-8B NVFP4", _nvfp4(qwen["8B"]), _HEITOR, {1: 39.4, 16: 634, 32: 1174}),
        *_decode("Llama-3.1-8B NVFP4", _nvfp4(_LLAMA_8B), _HEITOR, {1: 41.3, 16: 658, 32: 1204}),
        *_decode("Ministral-8B bf16", _bf16(_MINISTRAL), _HEITOR, {1: 14.5, 16: 229, 32: 413}),
        *_decode("Phi-4-mini bf16", _bf16(_PHI), _HEITOR, {1: 23.8, 16: 436, 32: 800}),
        *_decode("Qwen3-32B NVFP4", _nvfp4(qwen["32B"]), _HEITOR, {1: 11.0}),
        *_decode("Qwen3-8B bf16", _bf16(qwen["8B"]), _LYB, {1: 13.1}, context=200),
        *_decode("Qwen3-32B bf16", _bf16(qwen["32B"]), _LYB, {1: 3.7}, context=200),
        *_decode("Llama-3.1-8B FP8", _fp8(_LLAMA_8B), _LMSYS, {1: 20.5, 32: 368}, context=2100),
        *_decode("Llama-3.1-70B FP8", _fp8(_LLAMA_70B), _LMSYS, {1: 2.7}, context=2100),
        *_decode("R1-14B FP8", _fp8(_QWEN_14B), _LMSYS, {8: 83.5}, context=2100),
        *_decode(
            "granite-4.1-8b bf16, FP8 cache",
            _bf16(_GRANITE, kv_itemsize=1),
            _DJANGO,
            {1: 12.6, 10: 130},
            context=2300,
        ),
        *_decode(
            "Ministral-3-8B FP8", _fp8(_MINISTRAL_3), _DJANGO, {1: 25.4, 10: 253}, context=2300
        ),
        *_decode(
            "Qwen3-32B NVFP4",
            _nvfp4(qwen["32B"]),
            _LOCALAI,
            {8: 86, 32: 301, 64: 508, 128: 604},
            context=160,
            eager=True,
        ),
        *_decode(
            "Qwen3-0.6B bf16",
            _bf16(qwen["0.6B"]),
            _LOCALAI,
            {8: 923, 32: 2531, 64: 3497, 128: 4228},
            context=160,
            eager=True,
        ),
        *_decode("Qwen3-14B NVFP4", _nvfp4(qwen["14B"]), _NVIDIA, {1: 22.7}),
        *_decode("Llama-3.1-8B NVFP4, TensorRT-LLM", _nvfp4(_LLAMA_8B), _NVIDIA, {1: 38.7}),
        *_prompt("Llama-3.1-8B FP8", _fp8(_LLAMA_8B), _LMSYS, 7991),
        *_prompt("Llama-3.1-70B FP8", _fp8(_LLAMA_70B), _LMSYS, 803),
        *_prompt("R1-14B FP8", _fp8(_QWEN_14B), _LMSYS, 2074),
        *_prompt("Ministral-3-8B FP8", _fp8(_MINISTRAL_3), _DJANGO, 6680, context=1024),
        *_prompt("Ministral-3-8B FP8", _fp8(_MINISTRAL_3), _DJANGO, 5130, context=25000),
        *_prompt("granite-4.1-8b bf16", _bf16(_GRANITE), _DJANGO, 3625),
    ]


def checked_rows() -> list[dict[str, object]]:
    """Return every row with its prediction, for a result file."""
    rates = peak_rates(named_device("gb10"))
    found: list[dict[str, object]] = []
    for row in public_rows():
        tok_s, time = row.predicted(rates)
        found.append(
            {
                "row": row.name,
                "source": row.source,
                "measured_tok_s": row.tok_s,
                "predicted_tok_s": round(tok_s, 1),
                "error_pct": round(100 * (tok_s / row.tok_s - 1), 1),
                "bound": time.bound,
                "held_out": not row.eager,
            }
        )
    return found
