"""What runs inside vLLM's engine process: whole weights in, and weights in use compared.

Mixed into vLLM's worker by ``worker_extension_cls``. Methods return a problem as text ("" is
none): an exception would lose its type on the way, and some of them end the engine.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_distill.errors import DistillError
from qwen3_distill.generation import vllm_compat as compat
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.protocols import FullWeights, LoraWeights, WeightPayload
from qwen3_distill.types import WeightVersion

compat.keep_weights_plain()  # imported before the model is loaded


class WeightAccess:
    """Mixin of vLLM's worker."""

    model_runner: Any

    def distill_load_full(self, request: str) -> str:
        """Serve the version of a request file; compare every weight afterwards."""
        return _problem(lambda: self._load_full(*_read(request)))

    def distill_check_adapter(self, request: str) -> str:
        """Compare the adapter slot with the version of a request file."""
        return _problem(lambda: self._check_adapter(*_read(request)))

    @torch.no_grad()
    def _load_full(self, version: WeightVersion, payload: WeightPayload) -> str:
        if not isinstance(payload, FullWeights):
            return f"{version} was published as adapters, this engine serves whole weights"
        published = payload.tensors
        before = _raw_digest(self._served()) if self._is_quantized() else None
        mismatch = _mismatch(self._served_shapes(), published)
        if mismatch:
            return f"{version}: {mismatch}"
        compat.load_full(self.model_runner, list(published.items()))
        if before is not None and before == _raw_digest(self._served()):
            return f"{version}: the quantized weights in use did not change"
        for name, own, plain in compat.unfused(self._model()):
            if plain and not torch.equal(own, published[name].to(own)):
                return f"{version}: {name} in use is not the published one"
        return ""

    @torch.no_grad()
    def _check_adapter(self, version: WeightVersion, payload: WeightPayload) -> str:
        if not isinstance(payload, LoraWeights):
            return f"{version} was published as whole weights, this engine serves adapters"
        scaling = payload.alpha / payload.rank
        left = dict(payload.tensors)
        for name, slot_a, slot_b in compat.adapter_slots(self._model()):
            prefix = f"base_model.model.{name}.lora_"
            a, b = left.pop(f"{prefix}A.weight", None), left.pop(f"{prefix}B.weight", None)
            expected_a, expected_b = torch.zeros_like(slot_a), torch.zeros_like(slot_b)
            if a is not None and b is not None:
                expected_a[: a.shape[0]] = a.to(slot_a)
                scaled = b.to(slot_b) if scaling == 1 else b.to(slot_b) * scaling
                expected_b[:, : b.shape[1]] = scaled
            if not (torch.equal(slot_a, expected_a) and torch.equal(slot_b, expected_b)):
                return f"{version}: the adapter of {name} in use is not the published one"
        if left:
            return f"{version}: vLLM has no place for the adapters {sorted(left)[:3]}"
        return ""

    def _model(self) -> torch.nn.Module:
        runner = self.model_runner
        return runner.get_model() if hasattr(runner, "get_model") else runner.model

    def _served(self) -> dict[str, Tensor]:
        return {name: own for name, own, _ in compat.unfused(self._model())}

    def _served_shapes(self) -> dict[str, torch.Size] | None:
        """Shapes by Hugging Face name; None where quantization has fused and turned them."""
        if self._is_quantized():
            return None
        return {name: own.shape for name, own in self._served().items()}

    def _is_quantized(self) -> bool:
        return any(not plain for _, _, plain in compat.unfused(self._model()))


def write_request(path: Path, version: WeightVersion, channel: object) -> None:
    """What the engine process is asked to load or check."""
    path.write_bytes(pickle.dumps((version, channel)))


def _read(request: str) -> tuple[WeightVersion, WeightPayload]:
    version, channel = pickle.loads(Path(request).read_bytes())
    payload = channel.fetch(version)
    digest = weights_digest(payload.tensors)
    if digest != version.digest:
        raise DistillError(f"the channel's weights are not {version}: their digest is {digest}")
    return version, payload


def _problem(action: Any) -> str:
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - the boundary: see the module's text
        return str(error) if isinstance(error, DistillError) else f"{type(error).__name__}: {error}"


def _mismatch(shapes: Mapping[str, torch.Size] | None, published: Mapping[str, Tensor]) -> str:
    if shapes is None:
        return ""
    if shapes.keys() != published.keys():
        odd = sorted(shapes.keys() ^ published.keys())[:3]
        return f"published and served parameters have different names, e.g. {odd}"
    for name, shape in shapes.items():
        if published[name].shape != shape:
            found = tuple(published[name].shape)
            return f"{name} was published with shape {found}, served with {tuple(shape)}"
    return ""


def _raw_digest(weights: Mapping[str, Tensor]) -> str:
    return weights_digest({name: tensor.contiguous() for name, tensor in weights.items()})
