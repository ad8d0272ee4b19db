"""A process with many embedded learners."""

from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.training.embedded.worker import EmbeddedLearnerWorker
from tests.contract.pool import WorkerPool

if __name__ == "__main__":
    serve_worker(WorkerPool(EmbeddedLearnerWorker))
