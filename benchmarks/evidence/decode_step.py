"""Measures a decode step of the evidence's student on a GPU: attention's kernels, columns read.

    python -m benchmarks.evidence.decode_step

Figures, milliseconds with `ROWS` rows decoded together: `attention_fused_ms_ROWS` and
`attention_products_ms_ROWS`, one layer over 256 columns in float32 by PyTorch's fused kernel and by
two matrix products; `step_ms_ROWS_COLUMNS`, a captured step that reads so many of 256 columns.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.evidence.settings import MODELS
from benchmarks.lib.common import write_result
from qwen3_distill.generation.embedded import static_batch
from qwen3_distill.generation.embedded.grouped_attention import (
    attention_by_products,
    use_grouped_attention,
)
from qwen3_distill.generation.embedded.sampling import SamplingFeatures

_COLUMNS = 256


def milliseconds(call: Callable[[], object], times: int = 40) -> float:
    """Time a call on the GPU, the mean of many."""
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - started) / times * 1e3, 4)


@torch.inference_mode()
def attention(rows: int, heads: int, group: int, size: int) -> dict[str, float]:
    """Time one layer's attention of a decode step both ways."""
    query = torch.randn(rows, heads, group, size, device="cuda")
    key, value = torch.randn(2, rows, heads, _COLUMNS, size, device="cuda")
    mask = torch.zeros(rows, 1, 1, _COLUMNS, device="cuda")
    fused = torch.nn.functional.scaled_dot_product_attention
    return {
        f"attention_fused_ms_{rows}": milliseconds(lambda: fused(query, key, value, mask)),
        f"attention_products_ms_{rows}": milliseconds(
            lambda: attention_by_products(query, key, value, mask, None)
        ),
    }


@torch.inference_mode()
def steps(model: Any, rows: int) -> dict[str, float]:
    """Time captured steps that read more and more columns."""
    shape = static_batch._Shape(rows, _COLUMNS, SamplingFeatures(False, False, False), 0)
    made = static_batch._Steps(model, torch.device("cuda"), shape)
    figures: dict[str, float] = {}
    for width, graph in made._graphs.items():

        def replay(graph: Any = graph) -> None:
            made._slot.zero_()
            graph.replay()

        made._column.zero_()
        figures[f"step_ms_{rows}_{width}"] = milliseconds(replay)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, default=MODELS / "chain" / "student")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    model = model.to("cuda").eval()
    use_grouped_attention(model)
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    figures: dict[str, float] = {}
    for rows in (128, 2048):
        figures |= attention(rows, config.num_key_value_heads, group, config.head_dim)
        figures |= steps(model, rows)
    print(write_result("h200_evidence_decode", figures))


if __name__ == "__main__":
    main()
