"""A process with many unsloth learners."""

from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.training.unsloth.worker import UnslothWorker
from tests.contract.pool import WorkerPool

if __name__ == "__main__":
    serve_worker(WorkerPool(UnslothWorker))
