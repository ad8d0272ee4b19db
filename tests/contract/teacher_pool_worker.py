"""A process with many embedded teachers."""

from qwen3_distill.hosts.serve import serve_worker
from qwen3_distill.scoring.embedded.worker import EmbeddedTeacherWorker
from tests.contract.pool import WorkerPool

if __name__ == "__main__":
    serve_worker(WorkerPool(EmbeddedTeacherWorker, kept=100))
