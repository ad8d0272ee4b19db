"""Writes the FP8 checkpoint of a bfloat16 model: a scale per output channel, on a CPU.

    python scripts/make_fp8_checkpoint.py models/Qwen3-32B models/Qwen3-32B-FP8-channel

SGLang and vLLM load it without quantizing first (``scoring.quantization: null``). The linear layers
of all blocks are stored in FP8, embedding, output head and norms as they are. A scale is the row's
largest absolute value divided by 448. The form is that of compressed-tensors.

One weight after another is read and quantized: memory for one file of some gigabytes is enough. The
directory appears when it is whole; until then it is called ``.unfinished-OUT``, and is removed
where the script is stopped.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3_distill.errors import DistillError, ModelError, RunFolderError
from qwen3_distill.modeling.config_file import CONFIG, read_json_object
from qwen3_distill.modeling.directory import INDEX, check_model_dir, weight_files
from qwen3_distill.modeling.fp8_checkpoint import CHANNEL_SETTINGS, is_linear_weight
from qwen3_distill.modeling.student_directory import StudentFiles, read_student_files
from qwen3_distill.modeling.weight_headers import Header, check_weight_headers
from qwen3_distill.pipeline.disk_space import require_space
from qwen3_distill.recording.text import gibibytes
from qwen3_distill.training.fp8_base import quantize_rows
from qwen3_distill.utils.files import sync
from qwen3_distill.utils.signals import ctrl_c_ignored, signals_as_ctrl_c

ROWS = 1024
"""Rows that are in float32 at a time."""
SHARD_BYTES = 2 * 2**30
REPORT_EVERY_S = 5.0
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="directory with bfloat16 (or float32) weights")
    parser.add_argument("out", type=Path, help="directory to be made")
    arguments = parser.parse_args()
    try:
        with signals_as_ctrl_c():
            write_checkpoint(arguments.model, arguments.out, say=_say)
    except KeyboardInterrupt:
        kept = f"{arguments.out} is there" if arguments.out.exists() else "nothing was kept"
        print(f"stopped; {kept}", file=sys.stderr)
        sys.exit(130)
    except DistillError as error:
        sys.exit(f"error: {error}")
    print(arguments.out)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_checkpoint(
    model_dir: Path, out: Path, *, say: Callable[[str], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the FP8 checkpoint of a model directory; the directory appears when it is whole.

    Args:
        say: is told the progress.

    Raises:
        ModelError: the model is damaged, or quantized already.
        RunFolderError: ``out`` is there, or cannot be written, or its disk is too small.
    """
    out = out.absolute()
    files, headers = _read_source(model_dir)
    unfinished = out.with_name(f".unfinished-{out.name}")
    for path in (out, unfinished):
        if path.exists() or path.is_symlink():
            raise RunFolderError(
                f"{path} is there, and nothing is replaced; remove it, or choose another directory"
            )
    needed = sum(_written_bytes(name, header) for name, header in headers.items())
    advice = "free space, or choose a directory on another disk"
    require_space(out, needed, f"the checkpoint needs {gibibytes(needed, 2)}", advice)
    tensors = _quantized(model_dir, Progress(_bytes_to_quantize(headers), say))
    made = False
    try:
        with ctrl_c_ignored():
            unfinished.mkdir(parents=True)
            made = True  # else what is there would be another's
        _write_files(unfinished, files)
        _write_shards(unfinished, tensors, shard_bytes)
        check_weight_headers(check_model_dir(unfinished))
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)
        with ctrl_c_ignored():
            unfinished.rename(out)
            sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"cannot write {out}: {error}; free space or choose another directory"
        ) from error
    finally:
        if made:
            with ctrl_c_ignored():
                shutil.rmtree(unfinished, ignore_errors=True)


def _read_source(model_dir: Path) -> tuple[StudentFiles, Mapping[str, Header]]:
    directory = check_model_dir(model_dir)
    if read_json_object(directory / CONFIG).get("quantization_config") is not None:
        raise ModelError(
            f"{directory} is quantized already (quantization_config in {CONFIG}), expected "
            "bfloat16 or float32 weights; give the unquantized model"
        )
    return read_student_files(directory), check_weight_headers(directory)


def _written_bytes(name: str, header: Header) -> int:
    values = math.prod(header.shape)
    if is_linear_weight(name):
        return values + 4 * header.shape[0]
    return values * _ITEMSIZE.get(header.dtype, 4)


def _bytes_to_quantize(headers: Mapping[str, Header]) -> int:
    return sum(
        math.prod(header.shape) * _ITEMSIZE.get(header.dtype, 4)
        for name, header in headers.items()
        if is_linear_weight(name)
    )


def _write_files(out: Path, files: StudentFiles) -> None:
    for name, content in files.unchanged.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    config = {**files.config, "quantization_config": CHANNEL_SETTINGS}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")


class Progress:
    """Tells every few seconds how much was quantized, and how long the rest will take.

    The other tensors are only copied, and not counted.
    """

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._done = 0
        self._started = self._told = time.perf_counter()

    def add(self, num_bytes: int) -> None:
        """Count bytes of a weight that was quantized."""
        self._done += num_bytes
        now = time.perf_counter()
        if now - self._told < REPORT_EVERY_S and self._done < self._total:
            return
        self._told = now
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / rate
        self._say(
            f"{gibibytes(self._done, 2)} of {gibibytes(self._total, 2)} quantized, "
            f"{rate / 2**30:.2f} GiB/s, ETA {left:.0f} s"
        )


def _quantized(model_dir: Path, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint; one of the model's is held at a time."""
    for name, tensor in _read(model_dir):
        if is_linear_weight(name):
            weight, scale = quantize(tensor)
            if not scale.isfinite().all():
                raise ModelError(f"{model_dir}: {name} is NaN or infinite; fetch the model again")
            yield name, weight
            yield f"{name}_scale", scale
            progress.add(tensor.numel() * tensor.element_size())
        else:
            yield name, tensor


def _read(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(model_dir):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                    tensor = handle.get_tensor(name)
                    yield name, tensor
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}; fetch the model again") from error


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values [outputs, inputs], and the scales [outputs, 1] by which they are multiplied."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(weight.shape[0], 1)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        values[rows], scales[rows] = quantize_rows(weight[rows])
    return values, scales


def _write_shards(out: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write files of some gigabytes, and the index of the tensors in them."""
    where: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    total = pending_bytes = shards = 0

    def flush() -> None:
        nonlocal pending_bytes, shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(pending, out / file, metadata={"format": "pt"})
        (out / file).chmod((out / CONFIG).stat().st_mode)  # safetensors lets nobody else read
        where.update(dict.fromkeys(pending, file))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += size
        total += size
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
