"""A process with many plain teachers."""

from qwen3_distill.hosts.serve import serve_worker
from tests.contract.plain_teacher_worker import PlainTeacherWorker
from tests.contract.pool import WorkerPool

if __name__ == "__main__":
    serve_worker(WorkerPool(PlainTeacherWorker, kept=100))
