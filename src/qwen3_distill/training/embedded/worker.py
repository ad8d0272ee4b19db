"""The process of an embedded learner: the same learner, served to the controller."""

from typing import Any

import torch

from qwen3_distill.config import EmbeddedTraining, ObjectiveConfig, ReplayConfig
from qwen3_distill.hosts.process import serve_worker
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.learner_service import LearnerService
from qwen3_distill.types import WeightVersion


class EmbeddedLearnerWorker(LearnerService):
    """What the worker serves; everything but `open` needs a learner that is open."""

    def open(
        self,
        model_dir: str,
        config: EmbeddedTraining,
        objective: ObjectiveConfig,
        replay: ReplayConfig | None,
        settings: dict[str, Any],
    ) -> WeightVersion:
        """Load the student; its first version.

        Args:
            settings: ``total_steps``, ``seed``, ``publish_adapter``.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        learner = build_embedded_learner(model_dir, config, objective, replay=replay, **settings)
        self.learner = learner
        return learner.version


if __name__ == "__main__":
    serve_worker(EmbeddedLearnerWorker())
