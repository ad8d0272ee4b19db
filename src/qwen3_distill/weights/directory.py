"""Weight versions that come from a model directory instead of a learner."""

from pathlib import Path

import torch

from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.protocols import WeightChannel
from qwen3_distill.types import WeightVersion


def publish_directory(
    model_dir: str | Path, channel: WeightChannel, *, dtype: torch.dtype
) -> WeightVersion:
    """Publish the weights of a Hugging Face directory as step 0."""
    model = load_model(model_dir, device=torch.device("cpu"), dtype=dtype)
    weights = dict(model.named_parameters())
    version = WeightVersion(step=0, digest=weights_digest(weights))
    channel.publish(version, weights)
    return version
