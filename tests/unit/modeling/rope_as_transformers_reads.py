"""The rotary embedding's settings that the installed transformers reads from a directory."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")


def with_rope(model: Path, config: dict[str, Any]) -> None:
    """Give a model directory the rotary embedding's settings of ``config``, and no others."""
    file = model / "config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in _KEYS}
    file.write_text(json.dumps(kept | {key: config[key] for key in _KEYS if key in config}))


def rope_of_directory(model: Path) -> dict[str, Any]:
    """What transformers reads, without its own name for ``rope_type``."""
    read: dict[str, Any] = dict(AutoConfig.from_pretrained(model).rope_parameters)
    read.pop("type", None)
    return read
