import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from qwen3_distill.errors import EngineError, WeightVersionError
from qwen3_distill.modeling.digest import weights_digest
from qwen3_distill.modeling.loading import load_model
from qwen3_distill.ports import (
    FullWeights,
    LoraWeights,
    Reach,
    WeightChannel,
    WeightPayload,
    reaches,
)
from qwen3_distill.training.shelf import Shelf
from qwen3_distill.types import WeightVersion
from qwen3_distill.weights import ipc
from qwen3_distill.weights.adapter_files import load_adapter
from qwen3_distill.weights.directory import DirectoryChannel, publish_directory
from qwen3_distill.weights.ipc import IpcChannel
from qwen3_distill.weights.memory import MemoryChannel
from tests.tiny_models import TinyModels

FIRST = WeightVersion(step=0, digest="a")
SECOND = WeightVersion(step=1, digest="b")


def some_weights() -> dict[str, Tensor]:
    return {"w": torch.arange(4.0), "b": torch.ones(2, requires_grad=True)}


def some_payload() -> FullWeights:
    return FullWeights(tensors=some_weights())


def test_the_channel_gives_back_what_was_published() -> None:
    channel, weights = MemoryChannel(), some_weights()
    channel.publish(FIRST, FullWeights(tensors=weights))
    fetched = channel.fetch(FIRST).tensors
    assert fetched.keys() == weights.keys()
    assert all(torch.equal(fetched[name], weights[name]) for name in weights)
    assert not any(tensor.requires_grad for tensor in fetched.values())


def test_the_channel_keeps_a_copy() -> None:
    channel, weights = MemoryChannel(), some_weights()
    channel.publish(FIRST, FullWeights(tensors=weights))
    weights["w"].add_(1)  # the optimizer writes into its own tensors
    weights["extra"] = torch.zeros(1)
    assert channel.fetch(FIRST).tensors["w"].tolist() == [0, 1, 2, 3]
    assert channel.fetch(FIRST).tensors.keys() == {"w", "b"}


def test_only_the_newest_version_can_be_fetched() -> None:
    channel = MemoryChannel()
    channel.publish(FIRST, some_payload())
    channel.publish(SECOND, FullWeights(tensors={"w": torch.zeros(1)}))
    assert channel.fetch(SECOND).tensors.keys() == {"w"}
    with pytest.raises(WeightVersionError, match=r"holds .*step=1.* not .*step=0"):
        channel.fetch(FIRST)


@pytest.mark.parametrize("change", [{"step": 3}, {"digest": "other"}], ids=str)
def test_a_version_must_match_in_step_and_digest(change: dict[str, int | str]) -> None:
    channel = MemoryChannel()
    channel.publish(FIRST, some_payload())
    with pytest.raises(WeightVersionError):
        channel.fetch(replace(FIRST, **change))


# --- Channels through files ---------------------------------------------------------------------


def some_adapter() -> LoraWeights:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{prefix}A.weight": torch.randn(2, 8), f"{prefix}B.weight": torch.randn(8, 2)}
    return LoraWeights(tensors=tensors, rank=2, alpha=6.0, target_modules=("q_proj",))


FILE_CHANNELS = {"directory": DirectoryChannel, "ipc_without_a_gpu": IpcChannel}


@pytest.fixture(params=FILE_CHANNELS.values(), ids=list(FILE_CHANNELS))
def file_channel(request: pytest.FixtureRequest, tmp_path: Path) -> WeightChannel:
    return request.param(tmp_path / "channel")


@pytest.mark.parametrize("payload", [some_payload(), some_adapter()], ids=["full", "adapter"])
def test_files_give_back_what_was_published_in_another_process(
    file_channel: WeightChannel, payload: WeightPayload
) -> None:
    file_channel.publish(FIRST, payload)
    elsewhere: WeightChannel = pickle.loads(pickle.dumps(file_channel))
    fetched = elsewhere.fetch(FIRST)
    assert type(fetched) is type(payload)
    assert replace(fetched, tensors={}) == replace(payload, tensors={})
    assert fetched.tensors.keys() == payload.tensors.keys()
    assert all(torch.equal(fetched.tensors[n], payload.tensors[n]) for n in payload.tensors)


def test_files_keep_the_version_that_an_engine_may_still_read(file_channel: WeightChannel) -> None:
    versions = [WeightVersion(step=step, digest="d") for step in range(4)]
    for version in versions:
        file_channel.publish(version, some_adapter())
    for version in versions[2:]:
        assert file_channel.fetch(version).tensors
    for version in versions[:2]:
        with pytest.raises(WeightVersionError, match="publish it first"):
            file_channel.fetch(version)


def test_a_version_that_was_not_written_to_its_end_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = DirectoryChannel(tmp_path)

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("qwen3_distill.weights.directory.sync", full_disk)
    with pytest.raises(EngineError, match=r"step=0.*No space left on device; make room there"):
        channel.publish(FIRST, some_payload())
    with pytest.raises(WeightVersionError):
        channel.fetch(FIRST)


def large_payload() -> FullWeights:
    sizes = [1, 700, 30, 300, 5, 650, 64]
    tensors = {f"layer.{i}": torch.randn(size, 2) for i, size in enumerate(sizes)}
    return FullWeights(tensors=tensors | {"turned": torch.randn(4, 90).T})


@pytest.mark.parametrize(("file_bytes", "files"), [(1 << 30, 1), (8_000, 2), (1_000, 8), (1, 8)])
def test_large_versions_are_files_of_about_equal_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, files: int
) -> None:
    monkeypatch.setattr("qwen3_distill.weights.directory._FILE_BYTES", file_bytes)
    channel, payload = DirectoryChannel(tmp_path), large_payload()
    channel.publish(FIRST, payload)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == files
    total = sum(tensor.nbytes for tensor in payload.tensors.values())
    largest = max(tensor.nbytes for tensor in payload.tensors.values())
    assert max(path.stat().st_size for path in written) < max(largest, total / files) + 1500
    fetched = DirectoryChannel(tmp_path).fetch(FIRST).tensors
    assert fetched.keys() == payload.tensors.keys()
    assert all(torch.equal(fetched[n], tensor) for n, tensor in payload.tensors.items())


def test_a_version_of_which_one_file_cannot_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_distill.weights.directory._FILE_BYTES", 1)

    def save(tensors: object, path: Path) -> None:
        if "00003-of" in path.name:
            raise OSError("No space left on device")
        save_file(tensors, path)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("qwen3_distill.weights.directory.save_file", save)
    with pytest.raises(EngineError, match=r"step=0.*No space left on device; make room there"):
        DirectoryChannel(tmp_path).publish(FIRST, large_payload())
    with pytest.raises(WeightVersionError):
        DirectoryChannel(tmp_path).fetch(FIRST)


CHANNELS = {**FILE_CHANNELS, "memory": lambda root: MemoryChannel()}


@pytest.mark.parametrize("build", CHANNELS.values(), ids=list(CHANNELS))
def test_an_adapter_s_directory_has_the_layout_of_peft(
    tmp_path: Path, build: Callable[[Path], WeightChannel]
) -> None:
    channel, folder = build(tmp_path / "channel"), tmp_path / "folder"
    channel.publish(FIRST, adapter := some_adapter())
    directory = channel.adapter_directory(FIRST, folder)
    config = PeftConfig.from_pretrained(str(directory))
    assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", 2, 6.0)  # pyright: ignore
    written = load_adapter(directory)
    assert replace(written, tensors={}) == replace(adapter, tensors={})
    assert all(torch.equal(written.tensors[n], t) for n, t in adapter.tensors.items())
    assert folder.exists() == isinstance(channel, MemoryChannel)  # the others have their own


@pytest.mark.parametrize("build", CHANNELS.values(), ids=list(CHANNELS))
def test_whole_weights_have_no_adapter_s_directory(
    tmp_path: Path, build: Callable[[Path], WeightChannel]
) -> None:
    channel = build(tmp_path / "channel")
    channel.publish(FIRST, some_payload())
    with pytest.raises(WeightVersionError, match="adapters"):
        channel.adapter_directory(FIRST, tmp_path / "folder")


def test_of_the_adapters_that_are_written_out_the_newest_two_stay(tmp_path: Path) -> None:
    channel = MemoryChannel()
    for step in range(4):
        version = WeightVersion(step=step, digest="d")
        channel.publish(version, some_adapter())
        channel.adapter_directory(version, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002-d", "step-000003-d"]


@pytest.mark.parametrize(
    ("reach", "receivers"),
    [
        ("process", {"process"}),
        ("machine", {"process", "machine"}),
        ("cluster", {"process", "machine", "cluster"}),
    ],
)
def test_a_channel_reaches_receivers_that_are_as_near_or_nearer(
    reach: Reach, receivers: set[Reach]
) -> None:
    channel = MemoryChannel()
    channel.reach = reach
    assert {place for place in get_args(Reach) if reaches(channel, place)} == receivers


@pytest.mark.parametrize("strict", [False, True])
def test_ipc_sends_files_once_a_receiver_could_not_open_its_handles(
    tmp_path: Path, strict: bool
) -> None:
    channel = IpcChannel(tmp_path, strict=strict)

    class FakeHandle:
        """Unpickles as a handle does that another process cannot open."""

        def __reduce__(self) -> tuple[object, ...]:
            return _no_ipc, ()

    (tmp_path / "handles.pickle").write_bytes(pickle.dumps((FIRST, FakeHandle())))
    assert not channel.failed
    assert not channel.switched_transport(FIRST)
    with pytest.raises(WeightVersionError, match="CUDA IPC does not work here: invalid argument"):
        channel.fetch(FIRST)
    assert channel.failed
    assert channel.switched_transport(FIRST) == (not strict)
    assert not channel.switched_transport(SECOND)
    channel._lent = {"w": torch.zeros(1)}
    channel.publish(FIRST, some_payload())
    assert channel._lent == {}
    assert not channel.switched_transport(FIRST)  # it came as files
    assert channel.fetch(FIRST).tensors.keys() == {"w", "b"}


def test_handles_that_are_replaced_while_they_are_opened_do_not_end_ipc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = IpcChannel(tmp_path)

    def replaced() -> None:
        (tmp_path / "handles.pickle").write_bytes(b"those of the next version")
        raise RuntimeError("invalid device context")

    class FreedHandle:
        def __reduce__(self) -> tuple[object, ...]:
            return _replaced, ()

    monkeypatch.setitem(globals(), "_replace", replaced)
    (tmp_path / "handles.pickle").write_bytes(pickle.dumps((FIRST, FreedHandle())))
    with pytest.raises(WeightVersionError, match="replaced while it was fetched"):
        channel.fetch(FIRST)
    assert not channel.failed


def _replace() -> None:
    """Set by a test."""


def _replaced() -> None:
    _replace()


def test_no_reader_of_a_handle_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    released, rebuilt = list[tuple[bytes, int]](), list[dict[str, object]]()
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)

    def reduce(tensor: torch.Tensor) -> tuple[object, ...]:
        values = {name: f"the {name}" for name in names} | {"ref_counter_handle": b"file"}
        return rebuild_cuda_tensor, (*(values | {"ref_counter_offset": len(tensor)}).values(),)

    monkeypatch.setattr(ipc, "reduce_tensor", reduce)
    monkeypatch.setattr(
        torch.UntypedStorage, "_release_ipc_counter_cuda", lambda *of: released.append(of)
    )
    monkeypatch.setattr(
        "torch.multiprocessing.reductions.rebuild_cuda_tensor",
        lambda *values: rebuilt.append(dict(zip(names, values, strict=True))),
    )
    file = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild_cuda_tensor)
        ipc._Lending(file).dump((FIRST, {"w": torch.zeros(3), "b": torch.zeros(1)}))
    assert released == [(b"file", 3), (b"file", 1)]
    assert pickle.loads(file.getvalue())[0] == FIRST
    assert [one["ref_counter_handle"] for one in rebuilt] == [
        b"/qwen3-distill-counts-no-readers"
    ] * 2
    assert [one["ref_counter_offset"] for one in rebuilt] == [3, 1]
    assert rebuilt[0]["storage_handle"] == "the storage_handle"


MEGABYTES = 32 << 20


def on_the_gpu(value: int) -> FullWeights:
    return FullWeights(
        tensors={"w": torch.full((MEGABYTES,), value, dtype=torch.uint8, device="cuda")}
    )


@pytest.mark.gpu
def test_on_a_gpu_a_version_that_nobody_fetched_is_freed_by_the_next(tmp_path: Path) -> None:
    channel, before = IpcChannel(tmp_path), torch.cuda.memory_allocated()
    for step in range(4):
        channel.publish(WeightVersion(step=step, digest=str(step)), on_the_gpu(step))
    assert torch.cuda.memory_allocated() - before == MEGABYTES


@pytest.mark.gpu
@pytest.mark.parametrize("readers", [1, 2])  # a second replica, or one that starts again
def test_on_a_gpu_other_processes_read_a_version_which_the_next_frees(
    readers: int, tmp_path: Path
) -> None:
    channel, before = IpcChannel(tmp_path), torch.cuda.memory_allocated()
    channel.publish(FIRST, on_the_gpu(7))
    reader = (
        "import sys, pathlib, pickle, torch; from qwen3_distill.weights.ipc import IpcChannel\n"
        "version = pickle.loads(bytes.fromhex(sys.argv[2]))\n"
        "read = IpcChannel(pathlib.Path(sys.argv[1])).fetch(version).tensors\n"
        "print(read['w'].unique().tolist())\n"
        "del read  # told to PyTorch's counter, if there is one\n"
    )
    for _ in range(readers):
        command = [sys.executable, "-c", reader, str(tmp_path), pickle.dumps(FIRST).hex()]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == "[7]"
    channel.publish(SECOND, on_the_gpu(8))
    assert torch.cuda.memory_allocated() - before == MEGABYTES


@pytest.mark.gpu
def test_on_a_gpu_tensors_beside_one_another_are_read_and_freed(tmp_path: Path) -> None:
    """Several tensors of a block, which a reader opens once."""
    channel, before = IpcChannel(tmp_path), torch.cuda.memory_allocated()

    def version(step: int) -> FullWeights:
        shelf = Shelf(3 * MEGABYTES)
        like = torch.empty(MEGABYTES, dtype=torch.uint8, device="cuda")
        return FullWeights(
            tensors={n: shelf.like(like).fill_(step + i) for i, n in enumerate("abc")}
        )

    for step, expected in ((1, "123"), (4, "456")):
        published = WeightVersion(step=step, digest=str(step))
        channel.publish(published, version(step))
        reader = (
            "import sys, pathlib, pickle, torch; from qwen3_distill.weights.ipc import IpcChannel\n"
            "version = pickle.loads(bytes.fromhex(sys.argv[2]))\n"
            "read = IpcChannel(pathlib.Path(sys.argv[1])).fetch(version).tensors\n"
            "print(*(int(read[n].unique()) for n in 'abc'), sep='')\n"
            "print(len({read[n].untyped_storage().data_ptr() for n in 'abc'}))\n"
        )
        command = [sys.executable, "-c", reader, str(tmp_path), pickle.dumps(published).hex()]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        assert answer.stdout.split() == [expected, "1"]
    assert torch.cuda.memory_allocated() - before == 3 * MEGABYTES


def test_a_pickled_ipc_channel_holds_no_tensors(tmp_path: Path) -> None:
    channel = IpcChannel(tmp_path, strict=True)
    channel._lent = {"w": torch.zeros(1 << 16)}
    pickled = pickle.dumps(channel)
    assert len(pickled) < 1000
    assert vars(pickle.loads(pickled))["_lent"] == {}
    assert channel._lent.keys() == {"w"}


def _no_ipc() -> None:
    raise RuntimeError("invalid argument")


def test_an_empty_channel_holds_nothing() -> None:
    with pytest.raises(WeightVersionError, match="holds nothing"):
        MemoryChannel().fetch(FIRST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_is_published_as_step_0(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    channel = MemoryChannel()
    version = publish_directory(tiny_models.student, channel, dtype=dtype)
    fetched = channel.fetch(version).tensors
    model = load_model(tiny_models.student, device=torch.device("cpu"), dtype=dtype)
    expected = dict(model.named_parameters())
    assert version == WeightVersion(step=0, digest=weights_digest(expected))
    assert version.digest == weights_digest(fetched)
    assert all(torch.equal(fetched[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in fetched.values()} == {dtype}


def test_a_directory_has_the_same_version_every_time(tiny_models: TinyModels) -> None:
    versions = {
        publish_directory(path, MemoryChannel(), dtype=torch.float32)
        for path in (tiny_models.student, tiny_models.student, tiny_models.teacher)
    }
    assert len(versions) == 2
