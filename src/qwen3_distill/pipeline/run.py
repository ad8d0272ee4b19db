"""Runs a config from its start, or from its newest checkpoint, to the report."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwen3_distill.config import RunConfig
from qwen3_distill.errors import EngineStartError, LearnerLost, RunFolderError
from qwen3_distill.hosts.mps import MpsDaemon, private_mps
from qwen3_distill.modeling.digest import directory_digest
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.pipeline.assembly.cost import build_cost_model
from qwen3_distill.pipeline.assembly.engines import build_parts, engine_interpreters
from qwen3_distill.pipeline.assembly.machine import require_machine
from qwen3_distill.pipeline.assembly.plan import engine_log
from qwen3_distill.pipeline.assembly.teachers import teacher_records
from qwen3_distill.pipeline.assembly.views import build_view, special_token_lines
from qwen3_distill.pipeline.checkpoints import CheckpointStore
from qwen3_distill.pipeline.collected import run_offline
from qwen3_distill.pipeline.device_check import speed_notes
from qwen3_distill.pipeline.first_prompt import first_prompt, prompt_record, template_notes
from qwen3_distill.pipeline.manifest import (
    data_digests,
    engine_versions,
    git_revision,
    identity_record,
    machine,
    versions,
)
from qwen3_distill.pipeline.metering import Meter, metered
from qwen3_distill.pipeline.models import (
    HubRecord,
    LocalConfig,
    asks_hub,
    localize,
    recorded_hub,
)
from qwen3_distill.pipeline.own_folder import refuse_inputs_as_student
from qwen3_distill.pipeline.parts import Parts, TextTools
from qwen3_distill.pipeline.preflight import check_before_start, check_weights
from qwen3_distill.pipeline.recorder import Recorder
from qwen3_distill.pipeline.run_folder import RunFolder, full_disk_named
from qwen3_distill.pipeline.sequential import run_sequential
from qwen3_distill.pipeline.starting import start_engines
from qwen3_distill.pipeline.streaming import run_streaming
from qwen3_distill.pipeline.summary import render_report, summarize
from qwen3_distill.ports import Learner
from qwen3_distill.recording.console import ProgressReporter
from qwen3_distill.recording.cost_ledger import CostLedger
from qwen3_distill.recording.heartbeat import HeartbeatReporter
from qwen3_distill.training.schedule import extended_rate
from qwen3_distill.types import RunCursor
from qwen3_distill.utils.files import write_json_atomic
from qwen3_distill.utils.signals import signals_as_ctrl_c, stop_on_ctrl_c

INTERRUPTED_EXIT_CODE = 130

_PIPELINES = {
    "sequential": run_sequential,
    "streaming": run_streaming,
    "offline": run_offline,
}


def run(
    config: RunConfig,
    progress: ProgressReporter,
    warn: Callable[[str], None],
    adapt: Callable[[Parts], Parts] = lambda parts: parts,
) -> dict[str, Any] | None:
    """Distil as configured, from the run folder's newest checkpoint on.

    Args:
        warn: told of problems that do not stop the run, e.g. a corrupt checkpoint.
        adapt: may replace parts before the run, e.g. the teacher of a control experiment.

    Returns:
        The run's summary; None after a first Ctrl-C, when the step was finished and saved.
    """
    with RunFolder(config) as folder, progress, signals_as_ctrl_c():
        if folder.is_finished:
            progress.stage(
                f"the run in {folder.path} is complete; raise steps to go on, or remove the folder "
                "to run again"
            )
        else:
            if asks_hub(config):
                require_machine(config)
            recorded = recorded_hub(folder.manifest) if folder.has_records else {}
            local = localize(config, recorded=recorded, say=progress.stage, warn=warn)
            beating = HeartbeatReporter(progress, folder.status, total_steps=config.steps)
            with beating:
                done = asyncio.run(_run(local, folder, beating, warn, adapt))
                beating.end("finished" if done else "stopped")
            if not done:
                return None
        summary = folder.read_summary()
        progress.finish(summary, render_report(folder.path, config))
        return summary


async def _run(
    local: LocalConfig,
    folder: RunFolder,
    progress: HeartbeatReporter,
    warn: Callable[[str], None],
    adapt: Callable[[Parts], Parts],
) -> bool:
    began = time.perf_counter()
    if folder.changes:
        warn("going on with other settings than before:\n  " + "\n  ".join(folder.changes))
    config = local.config
    refuse_inputs_as_student(config)
    for note in check_before_start(config, reads_prompts=False):  # `build_parts` reads them
        warn(note)
    for teacher in config.teachers:
        progress.stage(f"checking that student and {teacher.role} match")
        build_view(config).check(
            load_identity(config.student.model, weights=False),
            load_identity(teacher.section.model, weights=False),
        )
    text = TextTools(config.student.model)
    prompt = first_prompt(config, text)
    for note in template_notes(config, text):
        warn(note)
    local.fetch_weights(progress.stage)
    if any(source.hub for source in local.sources.values()):
        check_weights(config)
    for note in await asyncio.to_thread(speed_notes, config, progress.stage):
        warn(note)
    async with AsyncExitStack() as stack:
        if config.pipeline.mps:  # before anything here uses CUDA; ends after the last engine
            progress.stage("starting MPS")
            daemon = MpsDaemon(engine_log(config, "mps"))
            await stack.enter_async_context(private_mps(daemon, warn))
        progress.stage("loading models")
        parts = adapt(build_parts(config, warn))
        stack.push_async_callback(parts.close)
        for note in parts.data.notes:
            warn(note)
        await parts.start(progress.stage)
        write_json_atomic(folder.prompt, prompt_record(prompt, special_token_lines(config)))
        cost_model = build_cost_model(config)
        cost = CostLedger(folder.cost, config.cost, began=began, unknown=cost_model.unknown)
        meter = Meter(cost_model, cost)
        return await _train_with_restarts(parts, folder, progress, warn, hub=local.hub, meter=meter)


async def _train_with_restarts(
    parts: Parts,
    folder: RunFolder,
    progress: HeartbeatReporter,
    warn: Callable[[str], None],
    *,
    hub: HubRecord,
    meter: Meter,
) -> bool:
    """`_train`, and again from the last checkpoint each time the learner's process is lost."""
    lost: LearnerLost | None = None
    for restarts_left in reversed(range(parts.learner.max_restarts + 1)):
        try:
            if lost is not None:
                warn(f"the learner is started again from the last checkpoint: {lost}")
                await _start_again(parts.learner, progress.stage)
            return await _train(parts, folder, progress, warn, hub=hub, meter=meter)
        except LearnerLost as error:
            if restarts_left == 0:
                raise
            lost = error
    raise AssertionError("the last attempt returns or raises")


async def _start_again(learner: Learner, say: Callable[[str], None]) -> None:
    await learner.close()
    try:
        await start_engines({"the learner again": learner.start}, say)
    except EngineStartError as error:  # it started before, so another try may succeed
        raise LearnerLost(str(error)) from error


async def _train(
    parts: Parts,
    folder: RunFolder,
    progress: HeartbeatReporter,
    warn: Callable[[str], None],
    *,
    hub: HubRecord,
    meter: Meter,
) -> bool:
    """Train from the newest checkpoint on; return whether the last step was reached.

    Raises:
        LearnerLost: the learner's process died; its steps since the checkpoint are lost.
    """
    config = parts.config
    _check_same_inputs(parts, folder)
    cursor = await _restore(parts, folder, progress, warn)
    if folder.extended_from is not None:
        warn(_extension(config, folder.extended_from, cursor.step))
    _write_manifest(parts, folder, cursor.step, hub)
    folder.accept_changes()
    recorder = Recorder(parts, folder, progress, start_step=cursor.step, meter=meter)
    progress.watch(recorder.trace)
    try:
        with _stop_on_interrupt(recorder, progress):
            loop = _PIPELINES[config.pipeline.kind]
            cursor = await loop(metered(parts, meter), recorder, cursor)
        # A stop in the last step skips the final evaluation: the run is not complete.
        if recorder.stop_requested or cursor.step < config.steps:
            await recorder.checkpoint(cursor)
            return False
        with full_disk_named(folder.student):
            await parts.learner.save_student(folder.student)
        meter.ledger.write("end")
        write_json_atomic(folder.summary, summarize(folder, recorder.wall_s))
        return True
    except LearnerLost as error:
        if not recorder.stop_requested:
            raise
        warn(f"the learner was lost while the run was stopping; the last checkpoint stays: {error}")
        return False
    finally:
        recorder.close()


async def _restore(
    parts: Parts, folder: RunFolder, progress: HeartbeatReporter, warn: Callable[[str], None]
) -> RunCursor:
    """Load the newest checkpoint into the learner; return its cursor, or that of the start."""
    keep_last = parts.config.checkpoint.keep_last
    store = CheckpointStore(folder.checkpoints, keep_last=keep_last, identity=folder.identity)
    cursor = await store.restore(parts.learner, warn, parts.following)
    if cursor is None:
        return RunCursor(step=0, prompts_drawn=0, weight_version=parts.learner.version)
    progress.stage(f"continuing from the checkpoint of step {cursor.step}")
    return cursor


def _inputs(parts: Parts) -> dict[str, dict[str, Any]]:
    """Return the manifest's records of student, teacher and prompt files."""
    weights = directory_digest(parts.config.student.model)
    student = {**identity_record(parts.learner.identity), "weights_digest": weights}
    inputs = {"student": student, "data": data_digests(parts.config)}
    if parts.teacher is not None:
        records = teacher_records(parts.teacher)
        if parts.following is not None:
            records["teacher"]["id"] = parts.following.initial_teacher_id
        inputs |= records
    return inputs


def _check_same_inputs(parts: Parts, folder: RunFolder) -> None:
    """Check that the models and prompts of a resumed run have the content that it began with.

    Raises:
        RunFolderError: names every difference.
    """
    if not folder.has_records:
        return
    recorded, found = folder.read_inputs(), _inputs(parts)
    differences = [
        f"{role}.{key}: {recorded[role][key]} -> {value}"
        for role, values in found.items()
        for key, value in values.items()
        if key != "name" and recorded.get(role, {}).get(key, value) != value
    ]
    if differences:
        raise RunFolderError(
            f"run folder {folder.path} was begun with other files than the config's paths hold "
            "now:\n  "
            + "\n  ".join(differences)
            + "\nrestore their files, or choose another output_dir"
        )


def _extension(config: RunConfig, earlier_steps: int, step: int) -> str:
    """State what more steps mean for a run that stands at ``step``."""
    rate = extended_rate(config.training.optimizer, step, earlier_steps, config.steps)
    return (
        f"the run is extended from {earlier_steps} to {config.steps} steps, from step {step} on; "
        f"{rate}"
    )


def _write_manifest(parts: Parts, folder: RunFolder, step: int, hub: HubRecord) -> None:
    """Write the manifest, with one entry per start: a resumed run may have other versions."""
    start = {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "working_directory": str(Path.cwd()),
        "step": step,
        "changed": folder.changes,
        "versions": versions(),
        "engines": engine_versions(engine_interpreters(parts.config)),
        "machine": machine(),
        "code": git_revision(Path(__file__).parent),
        "hub": hub,
        "data": parts.data.counts,
    }
    write_json_atomic(
        folder.manifest,
        {**asdict(folder.identity), **_inputs(parts), "starts": [*folder.read_starts(), start]},
    )


def _stop_on_interrupt(
    recorder: Recorder, progress: HeartbeatReporter
) -> AbstractContextManager[None]:
    """At the first Ctrl-C, SIGTERM or SIGHUP finish the step and save; at the second leave."""

    def request_stop() -> None:
        recorder.stop_requested = True
        progress.stage("stopping after this step (again to stop at once)")

    return stop_on_ctrl_c(request_stop)
