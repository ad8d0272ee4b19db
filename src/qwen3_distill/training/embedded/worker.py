"""The worker of an embedded learner: the same learner, served to the controller."""

import torch

from qwen3_distill.config import EmbeddedTraining
from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.modeling.loading import resolve_device
from qwen3_distill.training.embedded.student import build_embedded_learner
from qwen3_distill.training.learner_service import LearnerService
from qwen3_distill.training.ranks import Ranks
from qwen3_distill.training.segments import grow_segments, lendable
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.types import WeightVersion


class EmbeddedLearnerWorker(LearnerService):
    """The object that the worker serves. All methods but `open` need an open learner."""

    def open(
        self, settings: LearnerSettings[EmbeddedTraining]
    ) -> tuple[WeightVersion, dict[str, str]]:
        """Load the student; return its first version, and a description."""
        if settings.training.threads is not None:
            torch.set_num_threads(settings.training.threads)
        ranks = None
        if self.place is not None and self.place.sharded:
            ranks = Ranks(self.place, resolve_device(settings.training.device))
        with lendable():  # trained weights are published where they are
            learner = build_embedded_learner(settings, shards=ranks)
        grow_segments(learner.student.device)
        return self._serve(learner)


if __name__ == "__main__":
    serve_worker(EmbeddedLearnerWorker())
