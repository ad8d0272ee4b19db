"""Measures how far a learner is from a student that vLLM serves in FP8, by the scales of both.

    python -m benchmarks.learning.fp8_student

vLLM's online ``fp8`` is emulated in the embedded rollout engine: every linear layer of the lab
student rounds its weight and its inputs to float8 with vLLM's scales, and multiplies what is left.
That engine answers 512 prompts of the lab's task, and the embedded learner computes the logprobs of
the sampled tokens with its layers

- ``as_loaded``: not rounded;
- ``row_scales``: ``base_precision: fp8``, a scale for each row of a weight;
- ``engine_scales``: the same layers, with the scales that vLLM has;
- ``engine_layers``: the engine's own emulated layers under the adapters, a control in float32: what
  this leaves is neither rounding nor scales.

A case is what the engine's and the learner's tensors are beside the products (``float32``,
``bfloat16``), then the engine's layers: ``plain`` (not rounded), ``fp8``, or ``fp8_merged``, where
the learner has adapters and the engine weights into which they were merged before they were
rounded. Figures are of the differences' sizes, in nats: ``CASE_LAYERS_mean`` and
``CASE_LAYERS_p99``; ``CASE_LAYERS_above_cap`` is the part of the tokens whose importance ratio is
above the objective's default cap.

The scales, read in vLLM 0.26.0 (``layers/quantization/online/fp8.py``,
``Fp8PerTensorOnlineLinearMethod``) and 0.32.0 (CPU; there the name is ``fp8_per_tensor``): one for
a weight as vLLM holds it, q, k and v in one matrix and gate and up in another; one for each token
of a layer's inputs, where the card has CUTLASS's FP8 products. Embeddings and head are not rounded.
"""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.common import RESULTS, write_result
from benchmarks.speed.embedded_decode import CONFIG, call_after_call, requests_of, serving
from qwen3_distill.config import EmbeddedTraining, LoraTuning, SampledReverseKL
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.head import token_stats
from qwen3_distill.modeling.loading import output_head, resolve_dtype
from qwen3_distill.training.batching import micro_batches
from qwen3_distill.training.embedded.student import EmbeddedLearner, build_embedded_learner
from qwen3_distill.training.fp8_base import Fp8Linear, Rowwise, quantize_rows
from qwen3_distill.training.lora import merged_parameters
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import Batch, Rollout, ScoredRollout, TeacherScore

STUDENT = Path("models/lab/student")
LAYERS = ("as_loaded", "row_scales", "engine_scales", "engine_layers")
CASES = ("plain", "fp8", "fp8_merged")
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers of which vLLM makes one matrix."""
_ADAPTER_SIZE = 0.01
_MICRO_BATCH_TOKENS = 8192


class ServedLinear(nn.Module):
    """A linear layer as vLLM serves it with online ``fp8``, emulated.

    Args:
        weight_NK: what rounding leaves of its weight, float32.
    """

    weight_NK: Tensor

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight_NK", weight_NK, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rounded_MK = dequantized(quantize_rows(x.reshape(-1, x.shape[-1])))
        return F.linear(rounded_MK, self.weight_NK).to(x.dtype).view(*x.shape[:-1], -1)


def dequantized(matrix: Rowwise) -> Tensor:
    """Return what rounding left of a matrix, in float32."""
    return matrix.values.float() * matrix.scales


def with_one_scale(weights: Sequence[Tensor]) -> list[Rowwise]:
    """Round to float8 with one scale for all of the matrices."""
    whole = quantize_rows(*(weight.reshape(1, -1) for weight in weights))
    values = whole.values.split([weight.numel() for weight in weights], dim=1)
    return [
        Rowwise(value.view(weight.shape), whole.scales.expand(weight.shape[0], 1).contiguous())
        for value, weight in zip(values, weights, strict=True)
    ]


def fused_layers(model: Any) -> Iterator[list[tuple[nn.Module, str]]]:
    """Yield the linear layers of which vLLM makes one matrix: their owners and names there."""
    for layer in model.model.layers:
        for names in FUSED:
            owner = layer.self_attn if hasattr(layer.self_attn, names[0]) else layer.mlp
            yield [(owner, name) for name in names]


def serve_in_fp8(model: Any) -> None:
    """Replace an engine's linear layers by rounded ones."""
    for places in fused_layers(model):
        weights = [getattr(owner, name).weight.detach() for owner, name in places]
        for (owner, name), rounded in zip(places, with_one_scale(weights), strict=True):
            setattr(owner, name, ServedLinear(dequantized(rounded)))


def take_engine_layers(core: Any) -> None:
    """Replace the frozen layers under a learner's adapters by those of the engine."""
    for places in fused_layers(core):
        layers = [getattr(owner, name) for owner, name in places]
        weights = [layer.base_layer.weight.detach() for layer in layers]
        for layer, rounded in zip(layers, with_one_scale(weights), strict=True):
            layer.base_layer = ServedLinear(dequantized(rounded))


def take_engine_scales(core: Any, dtype: torch.dtype) -> None:
    """Give a learner's FP8 layers the scales that vLLM has for weights of a dtype."""
    for places in fused_layers(core):
        layers = [getattr(owner, name).base_layer for owner, name in places]
        assert all(isinstance(layer, Fp8Linear) for layer in layers)
        rounded = with_one_scale([layer.original().to(dtype) for layer in layers])
        for layer, matrix in zip(layers, rounded, strict=True):
            layer.weight, layer.scales = matrix


def learner_with(layers: str, dtype: str, *, adapters: bool) -> EmbeddedLearner:
    """Build a learner of the lab student.

    Args:
        adapters: they change the model's answers, at random; else they do nothing yet.
    """
    training = EmbeddedTraining(
        kind="embedded",
        device="cpu",
        tuning=LoraTuning(kind="lora", rank=4, alpha=8.0),
        base_precision="fp8" if layers.endswith("scales") else "as_loaded",
        autocast="bfloat16" if dtype == "bfloat16" else "off",
    )
    objective = SampledReverseKL(kind="sampled_reverse_kl")
    learner = build_embedded_learner(
        LearnerSettings(
            model_dir=STUDENT, training=training, objective=objective, total_steps=1, seed=0
        )
    )
    core = learner.student.core
    if layers == "engine_scales":
        take_engine_scales(core, resolve_dtype(dtype))
    if layers == "engine_layers":
        take_engine_layers(core)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if adapters and "lora_B" in name:
                parameter.copy_(_ADAPTER_SIZE * torch.randn(parameter.shape, generator=generator))
    return learner


def adapters_share(learner: EmbeddedLearner) -> float:
    """Return the adapters' part of the weights, by their norms."""
    layers: list[Any] = [
        getattr(owner, name)
        for places in fused_layers(learner.student.core)
        for owner, name in places
    ]
    deltas = [layer.get_delta_weight("default").norm() for layer in layers]
    weights = [layer.base_layer.weight.norm() for layer in layers]
    return (torch.stack(deltas).norm() / torch.stack(weights).norm()).item()


async def answers(case: str, dtype: str, count: int | None = None) -> list[Rollout]:
    """Sample answers of the student, served as the case says; ``count``: the first ones only."""
    config = load_config(CONFIG, [f"student.model={STUDENT}"])
    engine = await serving(config, dtype)
    model: Any = engine._model
    if case == "fp8_merged":
        core = learner_with("as_loaded", dtype, adapters=True).student.core
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in merged_parameters(core):
                own[name].copy_(value)
    if case != "plain":
        serve_in_fp8(model)
    return await call_after_call(engine, requests_of(config)[:count])


@torch.no_grad()
def gaps(learner: EmbeddedLearner, rollouts: Sequence[Rollout]) -> Tensor:
    """Return the learner's logprobs of the sampled tokens minus the engine's."""
    student, found = learner.student, list[Tensor]()
    batch = Batch.uniform(
        [
            ScoredRollout(
                rollout=each, score=TeacherScore(teacher_id="none", logprobs=each.behavior_logprobs)
            )
            for each in rollouts
        ]
    )
    for micro in micro_batches(batch, _MICRO_BATCH_TOKENS):
        with student.autocast():
            hidden_ND = micro.at_loss_tokens(student.hidden(micro))
        head_VD = output_head(student.core)
        stats = token_stats(hidden_ND, head_VD, micro.target_N, chunk_tokens=_MICRO_BATCH_TOKENS)
        found.append(stats.logprob_N - micro.behavior_logprob_N)
    return torch.cat(found)


def figures_of(name: str, gap_N: Tensor) -> dict[str, float]:
    """Return the figures of a learner's differences to an engine."""
    cap = SampledReverseKL(kind="sampled_reverse_kl").ratio_cap
    assert cap is not None
    size_N = gap_N.abs()
    return {
        f"{name}_mean": round(size_N.mean().item(), 5),
        f"{name}_p99": round(size_N.quantile(0.99).item(), 5),
        f"{name}_above_cap": round((gap_N.exp() > cap).float().mean().item(), 5),
    }


def layers_of(dtype: str, case: str) -> tuple[str, ...]:
    """Return what the learner's layers are in turn."""
    if case == "plain":
        return ("as_loaded",)
    return LAYERS if (dtype, case) == ("float32", "fp8") else LAYERS[:3]


def measure() -> dict[str, float]:
    """Return every case's figures."""
    share = adapters_share(learner_with("as_loaded", "float32", adapters=True))
    figures = {"adapters_share_of_weights": round(share, 4)}
    for dtype in ("float32", "bfloat16"):
        for case in CASES:
            rollouts = asyncio.run(answers(case, dtype))
            figures[f"{dtype}_{case}_tokens"] = sum(each.num_tokens for each in rollouts)
            for layers in layers_of(dtype, case):
                learner = learner_with(layers, dtype, adapters=case == "fp8_merged")
                name = f"{dtype}_{case}_{layers}"
                figures |= figures_of(name, gaps(learner, rollouts))
                print(name, figures[f"{name}_mean"], figures[f"{name}_p99"], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    print(write_result("fp8_student", measure(), folder=arguments.results))


if __name__ == "__main__":
    main()
