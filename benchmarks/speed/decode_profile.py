"""Profiles a decode step of vLLM. Runs under vLLM's own interpreter, on a GPU.

    PYTHONPATH=src:. python -m benchmarks.speed.decode_profile --model models/random-4B \
        --label base --engine kv_cache_dtype=fp8 --requests base,final,unseeded

One engine, set up like the rollout process. Every variant of the requests is timed over whole
rounds (all sequences start together); then one round is profiled in its middle: each kernel's time
per step, and the share of the time in which the GPU was idle. Processor seconds of the client and
of the process with the model show whether the GPU may wait for the host.
``--engine distributed_executor_backend=uni`` puts scheduler and model into one process.

``--check`` compares the logprobs of sampled tokens with those of a prefill over the same sequences:
what the attention of a decode step computes beside that of whole sequences.

Variants: ``base`` is the request of the rollout process; ``final`` has one output at the end
instead of deltas; ``unseeded`` has no seed per request; ``plain`` asks for no logprobs.
"""
# pyright: reportMissingImports=false

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.profiler import ProfilerActivity, profile
from vllm import AsyncEngineArgs, TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.lib.gpu_trace import gpu_work, idle_share, milliseconds
from qwen3_distill.generation.vllm import compat
from qwen3_distill.generation.vllm.extension import WeightAccess
from qwen3_distill.generation.vllm.settings import VllmSettings
from qwen3_distill.types import SamplingSpec

CATEGORIES = {
    "attention": ("flash", "attention", "kernel_mha", "reshape_and_cache", "prepare_varlen"),
    "sampling": ("gumbel", "softmax", "ranks", "exponential", "distribution", "topk", "argmax"),
    "matrix products": ("gemm", "nvjet", "cutlass", "matmul", "cublas", "splitk"),
    "lora": ("lora",),
    "norms, rotary, activation": (
        "norm",
        "rotary",
        "silu",
        "act_and_mul",
        "triton_red",
        "triton_p",
    ),
    "copies": ("memcpy", "memset", "copy"),
}
_WINDOW_S = 1.0


class Profiled(WeightAccess):
    """Mixin of vLLM's worker that profiles a window of its GPU's work."""

    def distill_profile_start(self) -> float:
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()
        return time.process_time()

    def distill_profile_stop(self) -> str:
        """JSON: count and microseconds per kernel, and the GPU's busy time."""
        self._profile.stop()
        return json.dumps(gpu_work(self._profile))

    def distill_cpu_seconds(self) -> float:
        return time.process_time()


class Bench:
    """One engine and rounds of requests to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rng = np.random.default_rng(0)
        settings = VllmSettings(
            model_dir=args.model,
            dtype="bfloat16",
            eos_ids=(),
            max_sequences=args.max_sequences or args.sequences,
            max_model_tokens=1024,
            max_batched_tokens=None,
            kv_cache_bytes=int(args.kv_cache_gib * 2**30),
            stream_interval=args.stream_interval,
            lora_rank=None,
            quantization=args.quantization,
            float32_head=False,
            enforce_eager=False,
            engine_arguments={
                name: yaml.safe_load(value)
                for name, value in (item.split("=", 1) for item in args.engine)
            },
        )
        values = compat.engine_arguments(settings)
        values |= {"worker_extension_cls": "benchmarks.speed.decode_profile.Profiled"}
        began = time.perf_counter()
        self.engine: Any = AsyncLLM.from_engine_args(AsyncEngineArgs(**values))
        self.start_s = time.perf_counter() - began
        self.count = 0
        self.vocab_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]

    def sampling(self, variant: str, new_tokens: int) -> Any:
        spec = SamplingSpec(
            temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new_tokens, seed=self.count
        )
        params = compat.sampling_params(spec, ())
        params.ignore_eos = True
        if variant == "final":
            params.output_kind = RequestOutputKind.FINAL_ONLY
        if variant == "unseeded":
            params.seed = None
        if variant == "plain":
            params.logprobs = None
        return params

    async def one(self, variant: str, new_tokens: int) -> int:
        ids = self.rng.integers(0, self.vocab_size, self.args.prompt_tokens).tolist()
        self.count += 1
        params, tokens = self.sampling(variant, new_tokens), 0
        name = f"{variant}-{self.count}"
        async for output in self.engine.generate(TokensPrompt(prompt_token_ids=ids), params, name):
            tokens += len(output.outputs[0].token_ids)
        return tokens

    async def round(self, variant: str, new_tokens: int) -> tuple[int, float]:
        began = time.perf_counter()
        tokens = await asyncio.gather(
            *(self.one(variant, new_tokens) for _ in range(self.args.sequences))
        )
        return sum(tokens), time.perf_counter() - began

    async def ask(self, method: str) -> Any:
        (value,) = await self.engine.collective_rpc(method)
        return value

    async def timed(self, variant: str) -> dict[str, float]:
        await self.round(variant, 16)
        client, engine = time.process_time(), await self.ask("distill_cpu_seconds")
        tokens = seconds = 0.0
        for _ in range(self.args.rounds):
            round_tokens, round_s = await self.round(variant, self.args.new_tokens)
            tokens, seconds = tokens + round_tokens, seconds + round_s
        return {
            "tok_s": tokens / seconds,
            "client_cpu_share": (time.process_time() - client) / seconds,
            "engine_cpu_share": (await self.ask("distill_cpu_seconds") - engine) / seconds,
        }

    async def checked(self, sequences: int = 32, new_tokens: int = 256) -> dict[str, float]:
        """Return the gap in nats between decoding and a prefill, token by token."""

        async def last(name: str, ids: list[int], **settings: Any) -> Any:
            params = SamplingParams(
                temperature=1.0, output_kind=RequestOutputKind.FINAL_ONLY, **settings
            )
            tokens = TokensPrompt(prompt_token_ids=ids)
            (output,) = [each async for each in self.engine.generate(tokens, params, name)]
            return output

        async def one(number: int) -> np.ndarray:
            ids = self.rng.integers(0, self.vocab_size, self.args.prompt_tokens).tolist()
            output = await last(
                f"decoded-{number}",
                ids,
                max_tokens=new_tokens,
                ignore_eos=True,
                logprobs=0,
                seed=number,
            )
            answer = list(output.outputs[0].token_ids)
            decoded = output.outputs[0].logprobs
            again = await last(f"again-{number}", ids + answer, max_tokens=1, prompt_logprobs=0)
            whole = again.prompt_logprobs[len(ids) :]
            pairs = zip(answer, decoded, whole, strict=True)
            return np.array([mine[t].logprob - theirs[t].logprob for t, mine, theirs in pairs])

        gap = np.abs(np.concatenate(await asyncio.gather(*map(one, range(sequences)))))
        return {
            "tokens": gap.size,
            "mean_abs_nats": float(gap.mean()),
            "max_nats": float(gap.max()),
        }

    async def profiled(self) -> dict[str, Any]:
        """Milliseconds per step, by category and of the largest kernels."""
        running = asyncio.create_task(self.round("base", self.args.new_tokens))
        await asyncio.sleep(2.0)  # past the prompts; about a third of the new tokens
        await self.ask("distill_profile_start")
        await asyncio.sleep(_WINDOW_S)
        raw = json.loads(await self.ask("distill_profile_stop"))
        await running
        steps = steps_of(raw["kernels"])
        return {
            "steps": steps,
            "step_ms": raw["span_us"] / steps / 1e3,
            "idle_share": idle_share(raw),
            **milliseconds(raw, CATEGORIES, units=steps, largest=40),
        }


def steps_of(kernels: dict[str, Sequence[float]]) -> int:
    """Engine steps in the window: the sampler runs once in each."""
    for mark in ("gumbel_sample", "argmax"):
        counts = [int(count) for name, (count, _) in kernels.items() if mark in name.lower()]
        if counts:
            return max(1, min(counts))
    return 1


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(args)
    print(args.label, "started", round(bench.start_s, 1), flush=True)
    if args.wait_for:
        while not Path(args.wait_for).exists():  # others start beside it and measure before it
            await asyncio.sleep(0.2)
    result: dict[str, Any] = {
        "label": args.label,
        "engine": args.engine,
        "sequences": args.sequences,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("VLLM_")},
        "start_s": bench.start_s,
        "requests": {},
    }
    for variant in filter(None, args.requests.split(",")):
        result["requests"][variant] = await bench.timed(variant)
        print(args.label, variant, result["requests"][variant], flush=True)
    if args.check:
        result["check"] = await bench.checked()
        print(args.label, "check", result["check"], flush=True)
    if args.profile:
        result["profile"] = await bench.profiled()
        print(args.label, json.dumps(result["profile"], indent=1), flush=True)
    bench.engine.shutdown()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--label", default="base")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--max-sequences", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kv-cache-gib", type=float, default=24.5)
    parser.add_argument("--stream-interval", type=int, default=16)
    parser.add_argument("--quantization")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--requests", default="base", help="variants, comma-separated; or none")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--wait-for", help="a file; measuring begins when it is there")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = asyncio.run(measure(args))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
