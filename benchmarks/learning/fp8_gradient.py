"""Measures how FP8 under adapters turns the gradient of a trained model.

    python -m benchmarks.learning.fp8_gradient

The lab student, with adapters that already change its answers, learns from 24 of its answers to its
own task. Figures: the cosine of its gradient with the one in float32, on a CPU.
"""

import torch

from benchmarks.lib.common import write_result
from tests.contract.builders import run
from tests.unit.training.test_fp8_base import LAB, flat, lab_batch, learner

VARIANTS = {
    "bfloat16_autocast": {"autocast": "bfloat16"},
    "fp8_backward": {"base_precision": "fp8_backward"},
    "fp8": {"base_precision": "fp8"},
}


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
    print(write_result("fp8_gradient", figures), figures)


if __name__ == "__main__":
    main()
