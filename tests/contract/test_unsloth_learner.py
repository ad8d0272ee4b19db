"""What the unsloth learner does beyond the contract: parity, packing, memory, its process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_distill.config import LoraTuning, TuningConfig
from qwen3_distill.errors import DataError, EngineError, EngineLost, EngineStartError, ModelError
from qwen3_distill.hosts.child import engine_environment
from qwen3_distill.modeling.shapes import read_shape
from qwen3_distill.modeling.step_memory import GIB, Checkpointing, MemoryModel
from qwen3_distill.ports import FullWeights, LoraWeights
from qwen3_distill.training.hosted import HostedLearner
from qwen3_distill.training.settings import LearnerSettings
from qwen3_distill.training.unsloth.learner import unsloth_environment
from qwen3_distill.types import Batch, Update
from qwen3_distill.weights.directory import DirectoryChannel
from qwen3_distill.weights.memory import MemoryChannel
from tests.contract.adapters import EmbeddedLearnerAdapter, LearnerAdapter, LearnerCase
from tests.contract.builders import run, synthetic_rollout
from tests.contract.reference import reference_model
from tests.contract.test_learner import (
    DRIFT,
    FULL,
    LORA,
    SMOOTH,
    WORST,
    Bench,
    assert_same_weights,
    flat_difference,
    metric,
    sampled,
    steps,
    weights_of,
)
from tests.contract.unsloth_adapter import (
    ROOT,
    UnslothLearnerAdapter,
    own_process,
    pooled_learner,
    unsloth_config,
)
from tests.contract.unsloth_adapter import unsloth_environment as unsloth_adapter_environment
from tests.engines import INSTALLED
from tests.tiny_models import TinyModels

needs_unsloth = pytest.mark.unsloth
ADAPTER = UnslothLearnerAdapter()
EMBEDDED = EmbeddedLearnerAdapter("cpu")
each_tuning = pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])


@pytest.fixture(scope="module")
def bench(tiny_models: TinyModels) -> Bench:
    return Bench(
        tiny_models.student,
        reference_model(tiny_models.student),
        reference_model(tiny_models.teacher),
    )


def settings_of(tuning: TuningConfig = LORA, **changes: Any) -> LearnerCase:
    values: dict[str, Any] = {"publish_adapter": tuning.kind == "lora", "optimizer": SMOOTH}
    return LearnerCase(objective=sampled(), tuning=tuning, **(values | changes))


# --- The same numbers ---------------------------------------------------------------------------


def assert_same_step(
    bench: Bench,
    one: tuple[LearnerAdapter, LearnerCase],
    other: tuple[LearnerAdapter, LearnerCase],
    batch: Batch,
) -> None:
    """From identical weights, two learners take the same two steps."""
    left, right = (adapter.build(bench.student_dir, settings) for adapter, settings in (one, other))
    assert left.version == right.version
    before = weights_of(right)
    for ours, theirs in zip(steps(left, batch, 2), steps(right, batch, 2), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4 * ADAPTER.slack, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4 * ADAPTER.slack)
        for key in ("loss/entropy_nats", "loss/reverse_kl_nats"):
            assert mean(ours, key) == pytest.approx(mean(theirs, key), rel=1e-4 * ADAPTER.slack)
    limits = {"worst": WORST * ADAPTER.slack, "drift": DRIFT * ADAPTER.slack}
    assert_same_weights(weights_of(left), weights_of(right), before, **limits)


def mean(update: Update, key: str) -> float:
    """Over the step's tokens, however they were split."""
    parts = [m for m in update.metrics if m.key == key]
    return sum(part.total for part in parts) / sum(part.count for part in parts)


@needs_unsloth
@each_tuning
def test_unsloth_takes_the_embedded_learners_step(bench: Bench, tuning: TuningConfig) -> None:
    """A step shows its gradient: with a large eps it is a smooth function of it."""
    settings = settings_of(tuning)
    batch = bench.ragged_batch(sampled())
    assert_same_step(bench, (ADAPTER, settings), (EMBEDDED, settings), batch)


@needs_unsloth
@each_tuning
@pytest.mark.parametrize("micro_batch_tokens", [8192, 90])
def test_packing_takes_the_step_of_padding(
    bench: Bench, tuning: TuningConfig, micro_batch_tokens: int
) -> None:
    packs = UnslothLearnerAdapter(packing=True)
    settings = settings_of(tuning, micro_batch_tokens=micro_batch_tokens)
    learner = packs.build(bench.student_dir, settings)
    assert learner.describe()["packing"].startswith("on: differs from single sequences by")
    batch = bench.ragged_batch(sampled())
    assert_same_step(bench, (packs, settings), (ADAPTER, settings), batch)


@needs_unsloth
@each_tuning
@pytest.mark.parametrize("micro_batch_tokens", [8192, 90])
def test_shared_prompts_take_the_step_of_padding(
    bench: Bench, tuning: TuningConfig, micro_batch_tokens: int
) -> None:
    shares = UnslothLearnerAdapter(shared_prompts=True)
    settings = settings_of(tuning, micro_batch_tokens=micro_batch_tokens)
    learner = shares.build(bench.student_dir, settings)
    assert learner.describe()["shared prompts"].startswith("on: differs from single sequences by")
    batch = bench.grouped_batch(sampled())
    assert_same_step(bench, (shares, settings), (ADAPTER, settings), batch)


@needs_unsloth
def test_rounded_gradients_are_no_reason_against_shared_prompts_in_float32(bench: Bench) -> None:
    """The sum of rounded gradients is not the rounded sum, so the probe allows for it."""
    described = pooled(
        bench.student_dir, autocast="off", shared_prompts=True, base_precision="fp8_backward"
    ).describe()
    assert described["shared prompts"].startswith("on: differs from single sequences by")


@needs_unsloth
def test_packing_is_chosen_where_there_is_a_kernel_for_it(bench: Bench) -> None:
    chosen = pooled(bench.student_dir, packing="auto").describe()["packing"]
    if INSTALLED.device == "cpu":
        assert chosen.startswith("off: unsloth has no attention kernel")
    elif has_unsloth_any_of("flash_attn", "xformers") or unsloth_torch() >= (2, 12):
        assert chosen.startswith("on:")
    else:
        assert chosen.startswith("off: neither flash-attn nor xformers")


@needs_unsloth
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_candidates_come_from_the_fused_head_where_it_does_not_round(
    bench: Bench, dtype: str
) -> None:
    """On a CPU it makes logits of bfloat16 in bfloat16, on a GPU in float32."""
    chosen = pooled(bench.student_dir, dtype=dtype, packing="auto").describe()["candidates"]
    rounds = dtype == "bfloat16" and INSTALLED.device == "cpu"
    assert chosen == ("in chunks of logits" if rounds else "by the fused head")


def has_unsloth_any_of(*modules: str) -> bool:
    """Whether the interpreter of the tests' unsloth finds one of the modules."""
    code = f"import importlib.util; print(any(map(importlib.util.find_spec, {modules})))"
    return unsloth_says(code) == "True"


def unsloth_torch() -> tuple[int, ...]:
    """Major and minor version of the PyTorch of the tests' unsloth."""
    version = unsloth_says("from importlib.metadata import version; print(version('torch'))")
    return tuple(int(part) for part in version.split(".")[:2])


def unsloth_says(code: str) -> str:
    """Run Python code in the interpreter of the tests' unsloth; return what it prints."""
    environment = engine_environment(unsloth_adapter_environment())
    done = subprocess.run(
        [INSTALLED.python["unsloth"], "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_unsloth
def test_dropout_draws_by_the_step_and_the_seed(bench: Bench) -> None:
    dropout = LoraTuning(kind="lora", rank=4, dropout=0.3)
    batch = bench.ragged_batch(sampled())

    def losses(seed: int) -> list[float]:
        learner = ADAPTER.build(bench.student_dir, settings_of(dropout, seed=seed))
        return [update.loss for update in steps(learner, batch, 2)]

    # B = 0 at first: dropout shows from the second step on.
    assert losses(1) == pytest.approx(losses(1))
    plain = ADAPTER.build(bench.student_dir, settings_of(replace_dropout(dropout), seed=1))
    assert abs(steps(plain, batch, 2)[1].loss - losses(1)[1]) > 1e-6


def replace_dropout(tuning: LoraTuning) -> LoraTuning:
    return tuning.model_copy(update={"dropout": 0.0})


@needs_unsloth
@pytest.mark.parametrize(("precision", "lowest"), [("as_loaded", 0.995), ("fp8_backward", 0.99)])
def test_a_bfloat16_base_takes_nearly_the_float32_step(
    bench: Bench, tmp_path: Path, precision: str, lowest: float
) -> None:
    """Of the same weights: those that bfloat16 can hold. On CUDA these are the fused kernels."""
    rounded = tmp_path / "student"
    shutil.copytree(bench.student_dir, rounded)
    weights = load_file(rounded / "model.safetensors")
    held = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(held, rounded / "model.safetensors", metadata={"format": "pt"})
    batch = bench.ragged_batch(sampled())
    other = replace(
        batch,
        scored=batch.scored[:4],
        **{name: getattr(batch, name)[:4] for name in ("importance_weights", "task_advantages")},
    )

    def change(learner: Any, batch: Batch) -> Tensor:
        before = weights_of(learner)
        steps(learner, batch, 2)
        return flat_difference(weights_of(learner), before)

    learner = pooled(rounded, dtype="bfloat16", packing="auto", base_precision=precision)
    if precision == "fp8_backward":
        fused = 14 if INSTALLED.device == "cuda" else 0
        how, moved = learner.describe()["frozen layers"].split("; gradients moved by ")
        assert how == f"input gradients in FP8, {fused} of them in fused functions"
        assert 1e-3 < float(moved.split()[0]) < 0.2
    ours = change(learner, batch)
    exact = change(EMBEDDED.build(rounded, settings_of()), batch)
    elsewhere = change(EMBEDDED.build(rounded, settings_of()), other)
    cosine = torch.nn.functional.cosine_similarity

    assert cosine(ours, exact, dim=0) > lowest
    assert cosine(elsewhere, exact, dim=0) < 0.9


# --- Memory -------------------------------------------------------------------------------------


def pooled(
    model_dir: Path, memory_bytes: int | None = None, tuning: TuningConfig = LORA, **changes: Any
) -> HostedLearner:
    settings = LearnerSettings(
        model_dir=model_dir,
        training=unsloth_config(tuning=tuning, optimizer=SMOOTH, **changes),
        objective=sampled(),
        total_steps=10,
        seed=0,
        publish_adapter=tuning.kind == "lora",
        memory_bytes=memory_bytes,
    )
    learner = pooled_learner(settings, Path(os.devnull))
    run(learner.start())
    return learner


@needs_unsloth
def test_layers_are_recomputed_as_memory_demands_and_the_step_stays(bench: Bench) -> None:
    """With a million tokens a micro-batch, so that a tiny model fills gigabytes."""
    batch, tokens = bench.ragged_batch(sampled()), 1_000_000
    shape = read_shape(bench.student_dir)
    training = unsloth_config(tuning=LORA)
    model = MemoryModel.of(shape, training, on_gpu=INSTALLED.device != "cpu", merges=False)
    peaks = [
        model.held_bytes(tokens, Checkpointing(recomputed_layers=layers, offload=False))
        for layers in range(3)
    ]
    outcomes = []
    # Where both layers are recomputed, one beside the other, a two-layer model saves nothing more.
    for layers, mode in [(0, "auto"), (1, "auto"), (2, "on")]:
        learner = pooled(
            bench.student_dir,
            int(1.01 * peaks[layers] + 0.75 * GIB),
            gradient_checkpointing=mode,
            micro_batch_tokens=tokens,
        )
        (update,) = steps(learner, batch, 1)
        assert metric(update, "train/recomputed_layers") == layers
        assert f"{layers} of 2 layers recomputed" in learner.describe()["memory"]
        outcomes.append((update.loss, update.grad_norm))
    for outcome in outcomes:
        assert outcome == pytest.approx(outcomes[0], rel=1e-4 * ADAPTER.slack)


# --- What is refused ----------------------------------------------------------------------------


@needs_unsloth
def test_a_sequence_above_the_configured_length_is_refused_not_cut(bench: Bench) -> None:
    learner = ADAPTER.build(bench.student_dir, settings_of(max_model_tokens=60))
    fits = bench.batch(sampled(), [synthetic_rollout(20, 40)])
    assert run(learner.update(fits)).version.step == 1
    too_long = bench.batch(sampled(), [synthetic_rollout(20, 40), synthetic_rollout(21, 40)])
    with pytest.raises(DataError, match=r"has 61 tokens, more than training.max_model_tokens of"):
        run(learner.update(too_long))
    assert learner.version.step == 1


@needs_unsloth
def test_a_student_with_missing_weights_is_refused(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "student"
    shutil.copytree(bench.student_dir, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj"):
        ADAPTER.build(broken, settings_of())


def fake_package(directory: Path, name: str, version: str) -> None:
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (
            {},
            "unsloth is not installed for .*, expected 2026.10.9; .*engines install unsloth.*",
        ),
        ({"unsloth": "2025.1.1"}, "unsloth has version 2025.1.1"),
        ({"unsloth": "2026.10.9"}, "unsloth_zoo is not installed"),
        (
            {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "transformers": "6.0.0"},
            "transformers has version 6.0.0, expected 5.12 to 5.17; .*engines install unsloth",
        ),
        (
            {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "transformers": "5.17.0"},
            "unsloth 2026.10.9 cannot be imported: ModuleNotFoundError: No module named 'unsloth'",
        ),
    ],
)
def test_an_environment_without_the_right_unsloth_is_named(
    tiny_models: TinyModels, tmp_path: Path, installed: dict[str, str], message: str
) -> None:
    """This suite's own environment has no unsloth; what it claims to have is in the way first."""
    for name, version in installed.items():
        fake_package(tmp_path / "site", name, version)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    learner = own_process(
        tiny_models.student,
        tmp_path / "log",
        settings_of(),
        python=sys.executable,
        environment=environment,
    )
    with pytest.raises(EngineStartError, match=message):
        run(learner.start())
    assert not learner.host.is_running
    with pytest.raises(EngineError, match="start it first"):
        _ = learner.version
    run(learner.close())


# --- Its process --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnProcess:
    learner: HostedLearner
    log: Path
    directory: Path
    """Working directory of the controller when the process was started."""


@pytest.fixture(scope="module")
def own(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnProcess]:
    """A learner with a process of its own; tests leave it running."""
    directory = tmp_path_factory.mktemp("cwd")
    log = directory.parent / "unsloth.log"
    learner = own_process(bench.student_dir, log, settings_of(), gradient_checkpointing="auto")
    before = Path.cwd()
    os.chdir(directory)
    try:
        run(learner.start())
    finally:
        os.chdir(before)
    yield OwnProcess(learner, log, directory)
    run(learner.close())


@needs_unsloth
def test_the_process_says_how_it_runs_and_leaves_nothing_behind(own: OwnProcess) -> None:
    description = own.learner.describe()
    assert description["unsloth"] == "2026.10.9"
    assert description["device"].startswith(INSTALLED.device)
    assert f"packing: {description['packing']}" in own.log.read_text()
    assert list(own.directory.iterdir()) == []


@needs_unsloth
def test_a_channel_that_crosses_processes_is_published_to_from_there(
    own: OwnProcess, bench: Bench, tmp_path: Path
) -> None:
    files, memory = DirectoryChannel(tmp_path), MemoryChannel()
    version = run(own.learner.publish(files))
    assert run(own.learner.publish(memory)) == version == own.learner.version
    there, here = files.fetch(version), memory.fetch(version)
    assert isinstance(there, LoraWeights)
    assert isinstance(here, LoraWeights)
    assert there.tensors.keys() == here.tensors.keys()
    assert all(torch.equal(there.tensors[n], tensor) for n, tensor in here.tensors.items())


@needs_unsloth
def test_a_killed_learner_is_lost_and_goes_on_from_its_state(
    own: OwnProcess, bench: Bench, tmp_path: Path
) -> None:
    batch = bench.ragged_batch(sampled())
    spared = ADAPTER.build(bench.student_dir, settings_of())
    undisturbed = [update.version for update in steps(spared, batch, 3)]
    learner = own.learner
    start = learner.version
    (first,) = steps(learner, batch, 1)
    run(learner.save_state(tmp_path))

    async def killed_in_a_step() -> None:
        pending = learner.update(batch)
        learner.host.kill()
        await pending

    with pytest.raises(EngineLost, match="unsloth learner"):
        run(killed_in_a_step())
    with pytest.raises(EngineLost):
        run(learner.publish(MemoryChannel()))
    run(learner.close())
    run(learner.start())
    assert learner.version == start  # a new start knows nothing of what was
    run(learner.load_state(tmp_path, first.version))
    again = [first.version, *(u.version for u in steps(learner, batch, 2))]
    if ADAPTER.bitwise_repeatable:
        assert again == undisturbed
    assert [version.step for version in again] == [1, 2, 3]


@needs_unsloth
def test_a_start_that_takes_too_long_is_an_error_and_leaves_no_process(
    bench: Bench, tmp_path: Path
) -> None:
    learner = own_process(bench.student_dir, tmp_path / "log", settings_of(), start_timeout_s=0.5)
    with pytest.raises(EngineStartError, match=r"(no answer to open|did not start) within 0.5 s"):
        run(learner.start())
    assert not learner.host.is_running


def test_whether_segments_grow_is_unsloths_choice_or_the_configs(tiny_models: TinyModels) -> None:
    """In a process that lends its weights too."""
    wanted = settings_of(LORA, publish_adapter=False)

    def environment_of(**changes: Any) -> dict[str, str]:
        training = unsloth_config(tuning=wanted.tuning, optimizer=wanted.optimizer, **changes)
        return unsloth_environment(wanted.settings(tiny_models.student, training))

    assert not [name for name in environment_of() if "ALLOC_CONF" in name]
    changed = environment_of(environment={"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"})
    assert changed["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"


LOADS = """
import sys
sys.path.insert(0, {root!r} + "/src")
from pathlib import Path
from qwen3_distill.training.unsloth import student
from qwen3_distill.config import LoraTuning, SampledReverseKL, UnslothTraining
from qwen3_distill.training.settings import LearnerSettings
import torch

def load(*_):
    print("while loading", torch._C._accelerator_getAllocatorSettings())

def check_weights(*_):
    print("then", torch._C._accelerator_getAllocatorSettings())
    sys.exit()

student._load, student._check_weights = load, check_weights
torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
student.open_learner(
    LearnerSettings(
        model_dir=Path({model_dir!r}),
        training=UnslothTraining(kind="unsloth", tuning=LoraTuning(kind="lora")),
        objective=SampledReverseKL(kind="sampled_reverse_kl"),
        total_steps=1,
        seed=0,
    )
)
"""


@needs_unsloth
def test_weights_are_loaded_into_memory_that_can_be_lent(bench: Bench) -> None:
    said = unsloth_says(LOADS.format(root=ROOT, model_dir=str(bench.student_dir)))
    *_, loading, after = said.splitlines()
    assert loading == "while loading expandable_segments:False"
    assert after == "then expandable_segments:True"  # copies in FP8 are never lent


def test_full_weights_are_still_published_whole(bench: Bench) -> None:
    channel = MemoryChannel()
    learner = EMBEDDED.build(bench.student_dir, settings_of(FULL, publish_adapter=True))
    assert isinstance(channel.fetch(run(learner.publish(channel))), FullWeights)


def test_weights_that_forget_small_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="a step smaller than 1/256 of a weight is rounded away"):
        unsloth_config(tuning=FULL, dtype="bfloat16")
    unsloth_config(tuning=LORA, dtype="bfloat16")
    unsloth_config(tuning=FULL, dtype="float32")
