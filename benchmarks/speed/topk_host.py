"""Measures what a step over the teacher's most likely tokens costs the host, without any engine.

    python -m benchmarks.speed.topk_host

One step of ``--sequences`` answers: writing the requests to SGLang, reading its replies (arrays in
base64, and lists), building the scored rollouts, sending the batch to the learner's process and
laying out its micro-batches; with the sampled token alone, and with the teacher's ``--k`` most
likely ones. Processor seconds, the least of some rounds.
"""

import argparse
import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import RESULTS, write_result
from benchmarks.lib.random_work import Work
from qwen3_distill.config import SampledReverseKL, TopKDivergence
from qwen3_distill.config.load import load_config
from qwen3_distill.hosts.frames import Call, read_frame, write_frame
from qwen3_distill.scoring.served.groups import request_groups
from qwen3_distill.scoring.sglang.wire import SGLANG
from qwen3_distill.scoring.views import SameView
from qwen3_distill.training.batching import micro_batches
from qwen3_distill.types import (
    Batch,
    Rollout,
    SampledRequest,
    ScoredRollout,
    ScoreRequest,
    ScoringJob,
    TopKRequest,
)

CONFIG = Path(__file__).parents[2] / "configs" / "h200.yaml"


def reply_to(jobs: list[ScoringJob], k: int, *, arrays: bool, rng: np.random.Generator) -> bytes:
    """Return a reply as SGLang writes it."""
    entries = []
    for job in jobs:
        start = job.context_ids.size - 1
        ids = job.token_ids[start:].tolist()
        logprobs = (-5 - rng.random(len(ids) - 1)).astype(np.float32)
        values = [None, *logprobs.tolist()]
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length", "length": 0},
            "input_token_logprobs": [
                [value, token, None] for value, token in zip(values, ids, strict=True)
            ],
        }
        if k:
            meta |= _candidates(job, logprobs, k, arrays=arrays)
        entries.append({"output_ids": [], "meta_info": meta})
    return json.dumps(entries, separators=(",", ":")).encode()


def _candidates(job: ScoringJob, logprobs: np.ndarray, k: int, *, arrays: bool) -> dict[str, Any]:
    """The members of an answer that hold its candidates: k tokens, the sampled one among them."""
    sampled = job.token_ids[job.context_ids.size :]
    ids = (sampled[:, None] + np.arange(k)).astype(np.int32) % 151_000
    values = (logprobs[:, None] - 0.1 * np.arange(k)).astype(np.float32)
    ids[:, 0] = sampled
    if not arrays:
        rows = [
            [[v, i, None] for v, i in zip(*row, strict=True)]
            for row in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        return {"input_top_logprobs": [None, *rows]}
    found: dict[str, Any] = {
        "input_top_logprobs_shape": list(ids.shape),
        "input_top_logprobs_null_prefix": 1,
    }
    for name, array, dtype in (("val", values, "float32"), ("idx", ids, "int32")):
        found[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        found[f"input_top_logprobs_{name}_flat_b64_dtype"] = dtype
    return found


async def through_a_socket(batch: Batch) -> None:
    """Send a batch as the learner's process gets it."""
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_unix_connection(sock=ours)
    reader, other = await asyncio.open_unix_connection(sock=theirs, limit=1 << 20)
    read = asyncio.create_task(read_frame(reader))
    await write_frame(writer, Call(call=1, method="update", arguments=(batch,)))
    await read
    writer.close()
    other.close()


def seconds_of(work: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Return the fewest processor seconds of some rounds, and the last result."""
    taken, result = list[float](), None
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        taken.append(time.process_time() - began)
    return min(taken), result


def measure(arguments: argparse.Namespace, k: int, *, arrays: bool) -> dict[str, float]:
    """Return the seconds of every part of one step; ``k`` 0: the sampled token alone."""
    objective = (
        TopKDivergence(kind="top_k", k=k) if k else SampledReverseKL(kind="sampled_reverse_kl")
    )
    config = load_config(CONFIG).model_copy(update={"objective": objective})
    request: ScoreRequest = TopKRequest(k=k) if k else SampledRequest()
    work = Work(
        config=config,
        sequences=arguments.sequences,
        prompt_tokens=128,
        new_tokens=512,
        rounds=1,
        opd_steps=0,
        vocab_size=151_000,
    )
    rollouts: list[Rollout] = work.rollouts(arguments.sequences)
    jobs = [SameView().job(rollout) for rollout in rollouts]
    groups = [[jobs[i] for i in group] for group in request_groups(jobs, 16_384)]
    rng = np.random.default_rng(0)
    replies = [reply_to(group, k, arrays=arrays, rng=rng) for group in groups]
    seconds = dict[str, float]()

    def read() -> list[Any]:
        found = list[Any]()
        for reply, group in zip(replies, groups, strict=True):
            found += SGLANG.read_scores(
                reply, group, request, vocab_size=151_936, teacher_id="teacher"
            )
        return found

    rounds = arguments.rounds
    seconds["requests"], _ = seconds_of(
        lambda: [SGLANG.score_body(group, request) for group in groups], rounds
    )
    seconds["replies"], scores = seconds_of(read, rounds)
    ordered = dict(zip((job.rollout_id for group in groups for job in group), scores, strict=True))
    seconds["batch"], batch = seconds_of(
        lambda: Batch.uniform(
            [ScoredRollout(rollout=r, score=ordered[r.rollout_id]) for r in rollouts]
        ),
        rounds,
    )
    seconds["to_the_learner"], _ = seconds_of(lambda: asyncio.run(through_a_socket(batch)), rounds)
    seconds["micro_batches"], _ = seconds_of(lambda: list(micro_batches(batch, 10_240)), rounds)
    return {name: round(value, 4) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="topk_host", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    parts = {
        "sampled": measure(arguments, 0, arrays=False),
        f"top{arguments.k}": measure(arguments, arguments.k, arrays=True),
        f"top{arguments.k}_lists": measure(arguments, arguments.k, arrays=False),
    }
    figures = {f"{name}_host_s": round(sum(part.values()), 4) for name, part in parts.items()}
    print(json.dumps(parts, indent=1), flush=True)
    print(write_result(arguments.name, figures, folder=arguments.results, parts=parts), flush=True)


if __name__ == "__main__":
    main()
