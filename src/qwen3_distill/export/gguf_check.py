"""A GGUF file read back by transformers and compared with the directory it was made from."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qwen3_distill.errors import ModelError
from qwen3_distill.export.gguf_file import Quant, as_stored, require_gguf
from qwen3_distill.export.logits import (
    largest_difference,
    probe_ids,
    probe_logits,
    same_top_fraction,
)
from qwen3_distill.modeling.cpu_warmup import settle_vector_math
from qwen3_distill.modeling.loading import load_model, load_tokenizer

F16_TOLERANCE = 1e-2
"""Largest absolute difference of logits to which rounding to float16 is accepted."""

_SAME = 1e-3
"""Largest difference of logits between the file and the student with weights rounded alike."""

_TEXTS = (
    "What is 12 * 345.6? I'll say: it's 4147.2!",
    "def f(x):\n    return x[0] + 1  # naïve\r\n\n\tend",
    "  Ünïcödé, 漢字 и кириллица, emoji 🙂,   three spaces   ",
)


@dataclass(frozen=True, kw_only=True)
class GgufCheck:
    """The result of reading the file back."""

    max_abs_logit_diff: float
    same_top_fraction: float
    num_positions: int


def check_gguf(
    model_dir: Path, file: Path, quant: Quant, *, max_logit_diff: float = F16_TOLERANCE
) -> GgufCheck:
    """Compare logits and tokens of the file with those of the directory.

    The file must give the logits that the directory's weights give once they are rounded as the
    file stores them, and what the rounding changes is measured. All models run in float32 on the
    CPU, one after the other.

    Args:
        max_logit_diff: what float16 may change; ``q8_0`` is measured without a limit.

    Raises:
        ModelError: a weight is missing or another, text becomes other tokens, or float16 changes
            logits by more than ``max_logit_diff``.
    """
    _check_tokenizer(model_dir, file)
    found, ids = _logits_of(file, model_dir)
    student = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    exact = probe_logits(student, ids)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(as_stored(parameter, quant))
    fault = largest_difference(found, probe_logits(student, ids))
    if not fault <= _SAME:
        raise ModelError(
            f"{file.name} read back is another model than {model_dir} rounded to {quant}: their "
            f"logits differ by {fault:.3g}, expected at most {_SAME:g}; it was not kept"
        )
    check = GgufCheck(
        max_abs_logit_diff=largest_difference(found, exact),
        same_top_fraction=same_top_fraction(found, exact),
        num_positions=ids.numel(),
    )
    if quant == "f16" and not check.max_abs_logit_diff <= max_logit_diff:
        raise ModelError(
            f"rounding to float16 changes the logits of {model_dir} by "
            f"{check.max_abs_logit_diff:.3g}, expected at most {max_logit_diff:g}; the file was "
            "not kept. Accept it with --max-logit-diff, or use --to hf"
        )
    return check


def _logits_of(file: Path, model_dir: Path) -> tuple[Tensor, Tensor]:
    """Logits of the file's model, and the ids that they are of."""
    ids = probe_ids(AutoConfig.from_pretrained(model_dir))
    return probe_logits(_read_back(file), ids), ids


def _read_back(file: Path) -> Any:
    gguf = require_gguf()
    settle_vector_math()
    folder, name = str(file.parent), file.name
    config: Any = AutoConfig.from_pretrained(folder, gguf_file=name)
    # transformers' reader of qwen3 leaves this key out and takes Qwen3Config's default.
    key_length = gguf.GGUFReader(file).fields["qwen3.attention.key_length"]
    config.head_dim = int(key_length.contents())
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers has no switch for
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, config=config, dtype=torch.float32, output_loading_info=True
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{file.name} lacks {', '.join(missing[:5])}: the student is incomplete")
    return model.eval()


def _check_tokenizer(model_dir: Path, file: Path) -> None:
    own = load_tokenizer(model_dir)
    read: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    specials = "".join(own.get_added_vocab())
    for text in (*_TEXTS, specials):
        expected = own.encode(text, add_special_tokens=False)
        if read.encode(text, add_special_tokens=False) != expected:
            raise ModelError(
                f"the GGUF file's tokenizer reads {text[:60]!r} as other tokens than {model_dir}; "
                "it was not kept. Use --to hf"
            )
