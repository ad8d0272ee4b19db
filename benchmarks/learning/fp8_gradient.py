"""Measures how FP8 under adapters turns the gradient of a trained model.

    python -m benchmarks.learning.fp8_gradient

The lab student, with adapters that already change its answers, learns from 24 of its answers to its
own task. Figures: the cosine of its gradient with the one in float32, on a CPU; and the largest gap
of a matrix by the probe with which learners start, for the lab student and for 36 random layers.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.lib.common import write_result
from qwen3_distill.training.gradient_probe import gradient_gap, probe_rows
from tests.contract.builders import run
from tests.tiny_models import write_model
from tests.unit.training.test_fp8_base import LAB, flat, lab_batch, learner

VARIANTS = {
    "bfloat16_autocast": {"autocast": "bfloat16"},
    "fp8_backward": {"base_precision": "fp8_backward"},
    "fp8": {"base_precision": "fp8"},
}


def gaps(model: Path) -> dict[str, float]:
    """Return each variant's largest gap of a matrix's gradient to float32."""
    exact = learner(model).student
    expected, found = probe_rows(exact.core), dict[str, float]()
    for name, settings in VARIANTS.items():
        student = learner(model, **settings).student
        with student.autocast():
            found[name] = round(gradient_gap(probe_rows(student.core), expected), 4)
    return found


def main() -> None:
    batch = lab_batch()
    exact = learner(LAB / "student")
    run(exact.update(batch))
    figures: dict[str, float] = {}
    for name, settings in VARIANTS.items():
        other = learner(LAB / "student", **settings)
        run(other.update(batch))
        cosine = torch.cosine_similarity(flat(exact.gradient), flat(other.gradient), dim=0)
        figures[f"cosine_{name}"] = round(cosine.item(), 5)
    figures |= {f"gap_{name}": gap for name, gap in gaps(LAB / "student").items()}
    with tempfile.TemporaryDirectory() as folder:
        deep = Path(folder) / "model"
        sizes = {"num_hidden_layers": 36, "hidden_size": 64, "intermediate_size": 128}
        write_model(deep, seed=0, **sizes)
        figures |= {f"gap_{name}_36_layers": gap for name, gap in gaps(deep).items()}
    print(write_result("fp8_gradient", figures), figures)


if __name__ == "__main__":
    main()
