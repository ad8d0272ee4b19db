"""Loads weights inside vLLM's engine process and compares the weights in use with them.

Mixed into vLLM's worker by ``worker_extension_cls``. Methods return a problem as text ("" is
none): an exception would lose its type on the way, and some exceptions end the engine.
"""

import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_distill.errors import DistillError
from qwen3_distill.generation.vllm import compat
from qwen3_distill.modeling.digest import are_of_directory, weights_digest
from qwen3_distill.ports import FullWeights, LoraWeights, WeightChannel, WeightPayload
from qwen3_distill.types import WeightVersion

compat.keep_weights_plain()  # imported before the model is loaded


class WeightAccess:
    """Mixin of vLLM's worker."""

    model_runner: Any
    _in_use: str | None = None
    """Digest of the whole weights in use; None: the model directory's; "": a load has failed."""

    def distill_load_full(self, request: str) -> str:
        """Serve the version of a request file; compare every weight afterwards."""
        return _problem(lambda: self._load_full(*_read(request)))

    def distill_swap_adapter(self, request: str) -> str:
        """Write the version of a request file into the adapter's slot; compare it afterwards.

        In place, so that CUDA graphs stay valid, and from file to device without vLLM's own
        loader, which goes through the host.
        """
        device = next(self._model().parameters()).device
        return _problem(lambda: self._swap_adapter(*_read_checked(request, device)))

    @torch.no_grad()
    def _load_full(self, version: WeightVersion, payload: WeightPayload, fetch_s: float) -> str:
        """Load, check the digest of what was published, and compare what is in use with that.

        The digest is computed after the load: memory that another process lends may be given to
        something else meanwhile. With the digest right then, it was right while weights were read.
        """
        if not isinstance(payload, FullWeights):
            return f"{version} was published as adapters, this engine serves whole weights"
        published = payload.tensors
        differ = self._is_quantized() and not self._has_already(version, published)
        before = _raw_digest(self._served()) if differ else None
        mismatch = _mismatch(self._served_shapes(), published)
        if mismatch:
            return f"{version}: {mismatch}"
        self._in_use = ""
        started = time.perf_counter()
        compat.load_full(self.model_runner, list(published.items()))
        digest = weights_digest(published)
        digest_s = time.perf_counter() - started
        if digest != version.digest:
            return (
                f"the channel's weights are not {version}, or changed while they were loaded: "
                f"their digest is {digest}"
            )
        if before is not None and before == _raw_digest(self._served()):
            return f"{version}: the quantized weights in use did not change"
        other = _first_difference(
            (served.name, served.tensor, served.part.of(published[served.name]))
            for served in compat.unfused(self._model())
            if served.is_plain
        )
        if other is not None:
            return f"{version}: {other} in use is not the published one"
        self._in_use = version.digest
        compared_s = time.perf_counter() - started - digest_s
        print(  # noqa: T201 - to the engine's log
            f"weights of step {version.step}: fetched in {fetch_s:.3f} s, loaded and their digest "
            f"computed in {digest_s:.3f}, compared in {compared_s:.3f}",
            flush=True,
        )
        return ""

    def _has_already(self, version: WeightVersion, published: Mapping[str, Tensor]) -> bool:
        """Whether these weights are in use already, as those of a run's first push often are."""
        if self._in_use is not None:
            return self._in_use == version.digest
        return are_of_directory(published, self.model_runner.model_config.model)

    @torch.no_grad()
    def _swap_adapter(self, version: WeightVersion, payload: WeightPayload) -> str:
        if not isinstance(payload, LoraWeights):
            return f"{version} was published as whole weights, this engine serves adapters"
        slots = list(compat.adapter_slots(self._model()))
        wanted = {slot.name: _slot_contents(slot, payload) for slot in slots}
        homeless = payload.tensors.keys() - {_peft_name(name, m) for name in wanted for m in "AB"}
        if homeless:
            return f"{version}: vLLM has no place for the adapters {sorted(homeless)[:3]}"
        for slot in slots:
            slot.a.copy_(wanted[slot.name][0])
            slot.b.copy_(wanted[slot.name][1])
        other = _first_difference(
            (slot.name, found, given)
            for slot in compat.adapter_slots(self._model())
            for found, given in zip((slot.a, slot.b), wanted[slot.name], strict=True)
        )
        if other is not None:
            return f"{version}: the adapter of {other} in use is not the published one"
        return ""

    def _model(self) -> torch.nn.Module:
        runner = self.model_runner
        return runner.get_model() if hasattr(runner, "get_model") else runner.model

    def _served(self) -> dict[str, Tensor]:
        return {served.name: served.tensor for served in compat.unfused(self._model())}

    def _served_shapes(self) -> dict[str, torch.Size] | None:
        """Shapes by Hugging Face name; None where quantization has fused and turned them."""
        if self._is_quantized():
            return None
        return {served.name: served.whole_shape for served in compat.unfused(self._model())}

    def _is_quantized(self) -> bool:
        return not all(served.is_plain for served in compat.unfused(self._model()))


def write_request(path: Path, version: WeightVersion, channel: WeightChannel) -> None:
    """Write the request that the engine process is to load a version from a channel."""
    path.write_bytes(pickle.dumps((version, channel)))


def _read(request: str) -> tuple[WeightVersion, WeightPayload, float]:
    """Fetch the version of a request file; return the seconds it took, too."""
    started = time.perf_counter()
    version, channel = pickle.loads(Path(request).read_bytes())
    payload = channel.fetch(version)
    return version, payload, time.perf_counter() - started


def _read_checked(request: str, device: torch.device) -> tuple[WeightVersion, WeightPayload]:
    """Fetch the version of a request file to a device and check its digest."""
    version, payload, _ = _read(request)
    tensors = {name: tensor.to(device) for name, tensor in payload.tensors.items()}
    payload = replace(payload, tensors=tensors)
    digest = weights_digest(payload.tensors)
    if digest != version.digest:
        raise DistillError(f"the channel's weights are not {version}: their digest is {digest}")
    return version, payload


def _first_difference(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> str | None:
    """Return the name of the first two tensors that differ; None: there are none.

    It waits for the device once. To wait for each tensor would take as long as what other processes
    have queued on the same GPU, hundreds of times.
    """
    names, differ = list[str](), list[Tensor]()
    for name, found, wanted in pairs:
        names.append(name)
        is_other = (found != wanted.to(found)).any()
        differ.append(is_other.to(differ[0].device) if differ else is_other)
    if not differ:
        return None
    return next(
        (
            name
            for name, is_other in zip(names, torch.stack(differ).tolist(), strict=True)
            if is_other
        ),
        None,
    )


def _peft_name(module: str, matrix: str) -> str:
    return f"base_model.model.{module}.lora_{matrix}.weight"


def _slot_contents(slot: compat.AdapterSlot, payload: LoraWeights) -> tuple[Tensor, Tensor]:
    """The contents of a layer's slot: A, and B times the scaling; zeros beyond the rank."""
    slot_a, slot_b, part = slot.a, slot.b, slot.part
    filled_a, filled_b = torch.zeros_like(slot_a), torch.zeros_like(slot_b)
    a = payload.tensors.get(_peft_name(slot.name, "A"))
    b = payload.tensors.get(_peft_name(slot.name, "B"))
    if a is not None and b is not None:
        a, b = (a, part.of(b)) if part.dim == 0 else (part.of(a), b)
        filled_a[: a.shape[0]] = a.to(slot_a)
        filled_b[:, : b.shape[1]] = b.to(slot_b) * (payload.alpha / payload.rank)
    return filled_a, filled_b


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
