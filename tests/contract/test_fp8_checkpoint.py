"""A server of an FP8 checkpoint with a scale per channel: read as this project reads it.

vLLM computes with such weights on a CPU too. SGLang asks for a CUDA device while it loads them.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen3_distill.errors import DistillError
from tests.contract.builders import run
from tests.contract.served_adapter import Served, ServedConfig, build_served

ROOT = Path(__file__).parents[2]
ENGINES = [
    pytest.param(Served("vllm", "real"), id="vllm", marks=pytest.mark.vllm),
    pytest.param(Served("sglang", "real"), id="sglang", marks=[pytest.mark.sglang]),
]


def write_checkpoint(out: Path) -> Path:
    script, teacher = ROOT / "scripts" / "make_fp8_checkpoint.py", ROOT / "models/lab/teacher"
    subprocess.run([sys.executable, script, teacher, out], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("served", ENGINES)
def test_a_server_gives_the_known_answer_of_its_scales_and_of_no_others(
    served: Served, tmp_path: Path
) -> None:
    if served.engine == "sglang" and not served.on_gpu:
        pytest.skip("SGLang loads such a checkpoint on a GPU only")
    config = served.config(write_checkpoint(tmp_path / "fp8"))
    other = write_checkpoint(tmp_path / "other")
    file = other / "model-00001.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            tensor *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})

    async def check(config: ServedConfig) -> None:
        owner = build_served(config)
        await owner.start()  # raises unless the server gives the directory's known answer
        try:
            assert owner.server is not None
            key_file = tmp_path / "key"
            key_file.write_text(owner.server.api_key)
            where = {"urls": (owner.server.url,), "api_key_file": str(key_file)}
            with pytest.raises(DistillError, match="does not score as"):
                await build_served(config.model_copy(update={"model": str(other)} | where)).start()
        finally:
            await owner.close()

    run(check(config))
