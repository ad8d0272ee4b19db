"""Measures tokens/s and memory of every stage and of the sequential loop, for any config.

    python -m benchmarks.speed.stages --config configs/h200.yaml --parts generate,score,train,opd \
        student.model=models/random-4B scoring.model=models/random-8B
    python -m benchmarks.speed.stages --config configs/h200.yaml --parts resident \
        student.model=models/random-4B scoring.model=models/random-32B-FP8 scoring.quantization=null

Prompts are random tokens, and random models hardly ever stop by themselves, so responses have the
lengths asked for; the tokens really generated are counted. Every part is written into the same
result as soon as it is measured and replaces its earlier figures, so parts may be run one by one.

- `generate`: the rollout engine alone, serving the student's own weights.
- `score`: the teacher alone; also the same requests, prepared beforehand and sent over as many
  connections without parsing the answers, which shows what our client costs.
- `train`: the learner alone, without gradient checkpointing (micro-batches of 8 sequences; with
  `--together` the config's), with it (of 32), and as the config says, with the memory that the plan
  leaves.
- `opd`: all three resident; whole steps of the loop, stage by stage, weights pushed every step.
- `resident`: the same for one step, for the memory of a larger teacher.
- `trl`: `benchmarks/speed/trl_distillation.py` in an interpreter with TRL and vLLM.

With `--together` all engines are started once, concurrently, and every part but `trl` is measured
on them; `resident` then replaces the first teacher by that of `--resident-teacher`. This saves
minutes. It needs settings that leave memory while several engines load
(`scoring.memory_fraction` well above the planned one).
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.lib.common import RESULTS, Report, timed
from benchmarks.lib.device_memory import PeakMemory
from benchmarks.lib.random_work import Work
from benchmarks.lib.stage_parts import (
    measure_generate,
    measure_learner,
    measure_opd,
    measure_resident,
    measure_score,
    measure_train,
    started_learner,
    train_settings,
)
from qwen3_distill.config import TaskPrompts
from qwen3_distill.config.load import load_config
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.assembly.engines import build_parts, static_engine
from qwen3_distill.pipeline.assembly.plan import plan_memory
from qwen3_distill.pipeline.assembly.teachers import build_teacher
from qwen3_distill.pipeline.parts import Parts
from qwen3_distill.pipeline.step import push_weights

PARTS = ("generate", "score", "train", "opd", "resident", "trl")
STAGGER_S = 20.0
"""Seconds between the starts of two engines: the teacher sizes its cache before others grow."""


async def measure_together(arguments: argparse.Namespace, work: Work, report: Report) -> None:
    """Measure every part on engines that are started once."""
    wanted, config = arguments.parts, work.config
    parts = build_parts(config)
    with PeakMemory() as memory:
        try:
            _, start_s = await timed(start_side_by_side(parts))
            report.add("together", {}, start_s=start_s)
            await push_weights(parts)
            if "generate" in wanted:
                await measure_generate(work, report, parts.engine)
            if "score" in wanted:
                await measure_score(work, report, parts.required_teacher)
            if "opd" in wanted:
                await measure_opd(work, report, parts, memory)
            if "train" in wanted:
                await measure_own_learner(work, report, parts)
        except BaseException:
            await parts.close()
            raise
    try:
        for mode in arguments.train_modes if "train" in wanted else ():
            parts = await with_other_learner(work, report, parts, mode)
        if "resident" in wanted:
            await measure_other_teacher(arguments, work, report, parts, memory.before_bytes)
    finally:
        await parts.close()


async def with_other_learner(work: Work, report: Report, parts: Parts, mode: str) -> Parts:
    """Replace the learner by one with other memory settings, and measure it."""
    await parts.learner.close()
    training = train_settings(work, mode)
    config = work.config.model_copy(update={"training": training})
    learner, start_s = await started_learner(config)
    await measure_learner(work, report, learner, mode, training.micro_batch_tokens)
    report.add(f"train_{mode}", {}, start_s=start_s)
    return replace(parts, learner=learner)


async def start_side_by_side(parts: Parts) -> None:
    async def later(delay_s: float, start: Awaitable[None]) -> None:
        await asyncio.sleep(delay_s)
        await start

    engines = (parts.required_teacher, parts.engine, parts.learner)
    await asyncio.gather(
        *(later(index * STAGGER_S, engine.start()) for index, engine in enumerate(engines))
    )


async def measure_own_learner(work: Work, report: Report, parts: Parts) -> None:
    """Measure the resident learner, under the name of its settings."""
    training = work.config.training
    setting = str(getattr(training, "gradient_checkpointing", "auto"))
    mode = {"off": "off", "unsloth": "ckpt", "on": "ckpt"}.get(setting, "auto")
    await measure_learner(work, report, parts.learner, mode, training.micro_batch_tokens)


async def measure_other_teacher(
    arguments: argparse.Namespace, work: Work, report: Report, parts: Parts, before_bytes: int
) -> None:
    """Replace the teacher by a larger one, and measure a step with all engines resident.

    Args:
        before_bytes: memory of the device used before any engine was started.
    """
    await parts.required_teacher.close()
    given = work.config.teacher
    assert given.kind == "sglang", "--resident-teacher is served by SGLang"
    scoring = given.model_copy(
        update={
            "model": arguments.resident_teacher,
            "quantization": None,  # as its directory says
            "memory_fraction": arguments.resident_memory_fraction,
            "chunk_tokens": arguments.resident_chunk_tokens or given.chunk_tokens,
        }
    )
    config = work.config.model_copy(update={"scoring": scoring})
    teacher = build_teacher(config, plan_memory(config))
    with PeakMemory(before_bytes) as memory:
        try:
            _, start_s = await timed(teacher.start())
            others = replace(parts, teacher=teacher)
            figure = arguments.resident_figure
            await measure_resident(work, report, others, memory, figure)
            report.add("resident", {}, start_s=start_s)
        finally:
            await teacher.close()


def measure_trl(work: Work, report: Report, arguments: argparse.Namespace) -> None:
    """Measure TRL's trainer on the same step (`benchmarks/speed/trl_distillation.py`)."""
    folder = Path(work.config.output_dir)
    command = [arguments.trl_python, "-m", "benchmarks.speed.trl_distillation"]
    command += ["--student", work.config.student.model, "--teacher", work.config.teacher.model]
    command += ["--prompts", str(work.sequences), "--prompt-tokens", str(work.prompt_tokens)]
    command += ["--new-tokens", str(work.new_tokens), "--results", str(folder), "--name", "trl"]
    command += arguments.trl_arguments.split()
    environment = dict(os.environ)
    if arguments.trl_pythonpath:
        environment["PYTHONPATH"] = arguments.trl_pythonpath
    out = folder / "trl.json"
    out.unlink(missing_ok=True)
    if subprocess.run(command, env=environment).returncode != 0 or not out.exists():
        sys.exit("TRL was not measured: the cause is above; what was measured before is kept")
    result = json.loads(out.read_text())
    report.add("trl", result["figures"], runs=result["parts"]["runs"]["runs"])


async def measure(arguments: argparse.Namespace, work: Work, report: Report) -> None:
    wanted = arguments.parts
    config = work.config
    if arguments.together:
        await measure_together(arguments, work, report)
        wanted = [part for part in wanted if part == "trl"]
    if "generate" in wanted:
        with PeakMemory() as memory:
            async with static_engine(config, config.student.model) as engine:
                await measure_generate(work, report, engine)
            report.add("generate", {}, peak_gib=memory.peak_gib)
    if "score" in wanted:
        teacher = build_teacher(config, plan_memory(config))
        with PeakMemory() as memory:
            try:
                _, start_s = await timed(teacher.start())
                await measure_score(work, report, teacher)
            finally:
                await teacher.close()
            report.add("score", {}, peak_gib=memory.peak_gib, start_s=start_s)
    if "train" in wanted:
        await measure_train(work, report, arguments.train_modes)
    if {"opd", "resident"} & set(wanted):
        with PeakMemory() as memory:
            parts = build_parts(config)
            try:
                _, start_s = await timed(parts.start())
                if "opd" in wanted:
                    await measure_opd(work, report, parts, memory)
                    report.add("opd", {}, start_s=start_s)
                if "resident" in wanted:
                    figure = arguments.resident_figure
                    await measure_resident(work, report, parts, memory, figure)
            finally:
                await parts.close()
    if "trl" in wanted:
        measure_trl(work, report, arguments)


def main() -> None:
    arguments = parse()
    given = load_config(arguments.config, arguments.overrides)
    # Prompts are random tokens: neither a data file nor an evaluation is needed.
    config = given.model_copy(
        update={"prompts": TaskPrompts(kind="task"), "verifier": None, "evaluation": None}
    )
    work = Work(
        config=config,
        sequences=arguments.sequences or config.rollouts_per_step,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens or config.sampling.max_new_tokens,
        rounds=arguments.rounds,
        opd_steps=arguments.opd_steps,
        vocab_size=load_identity(config.student.model).vocab_size,
    )
    report = Report(arguments.name, arguments.results)
    asyncio.run(measure(arguments, work, report))
    print(arguments.results / f"{arguments.name}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--parts", type=_names(PARTS), default=list(PARTS[:4]))
    parser.add_argument("--name", default="stages", help="of the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--sequences", type=int, help="of a step; default: the config's")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, help="default: the config's")
    parser.add_argument("--rounds", type=int, default=2, help="measured of each stage")
    parser.add_argument("--opd-steps", type=int, default=2, help="measured, after one to warm up")
    parser.add_argument("--together", action="store_true", help="start each engine once")
    parser.add_argument("--resident-teacher", help="model directory, with --together")
    parser.add_argument(
        "--resident-memory-fraction", type=float, help="its scoring.memory_fraction"
    )
    parser.add_argument("--resident-chunk-tokens", type=int, help="its scoring.chunk_tokens")
    modes = ("off", "ckpt", "auto")
    parser.add_argument("--train-modes", type=_names(modes), default=list(modes))
    parser.add_argument("--resident-figure", default="resident_4b_32b_fp8_gib")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--trl-pythonpath", default="")
    parser.add_argument("--trl-arguments", default="", help="more for trl_distillation.py")
    return parser.parse_intermixed_args()


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown}: expected some of {','.join(known)}")
        return names

    return read


if __name__ == "__main__":
    main()
