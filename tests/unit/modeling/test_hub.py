"""Hub ids, against a stand-in of the hub's HTTP interface."""

import errno
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qwen3_distill.errors import DataError, ModelError
from qwen3_distill.modeling import hub
from qwen3_distill.modeling.hub import (
    HubCommit,
    fetch_weights,
    locate_dataset,
    locate_model,
    missing_weights,
    model_label,
    parse_id,
)
from tests.hub_stand_in import TOKEN, HubStandIn, running_hub, use_hub
from tests.tiny_models import TinyModels

REPO = "lab/student"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """The stand-in of the hub, with an empty cache; the working directory is empty too."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with running_hub() as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture
def model_dir(tmp_path: Path, tiny_models: TinyModels) -> Path:
    """A model with the files that repositories often have besides it."""
    folder = shutil.copytree(tiny_models.student, tmp_path / "model")
    (folder / "original").mkdir()
    for name in ("original/consolidated.00.safetensors", "pytorch_model.bin", "m.gguf", "a.png"):
        (folder / name).write_bytes(b"other")
    return folder


def no_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Point at a port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}", cache)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", "main")),
        ("Qwen/Qwen3-4B@v1", ("Qwen/Qwen3-4B", "v1")),
        ("Qwen/Qwen3-4B@refs/pr/3", ("Qwen/Qwen3-4B", "refs/pr/3")),
        ("Qwen/Qwen3-4B@", None),
        ("Qwen3-4B", None),
        ("/models/Qwen3-4B", None),
        ("./models", None),
        ("../models", None),
        ("~/models", None),
        ("a/b/c", None),
        ("a/b..c", None),
        ("a b/c", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(name: str, parsed: tuple[str, str] | None) -> None:
    assert parse_id(name) == parsed


def test_description_comes_first_and_weights_when_asked(
    stand_in: HubStandIn, model_dir: Path
) -> None:
    commit = stand_in.add(REPO, model_dir)
    said: list[str] = []
    source = locate_model(REPO, "student.model", say=said.append)
    assert source.hub == HubCommit(repo=REPO, revision="main", commit=commit)
    assert said == [f"student.model: {REPO} at commit {commit[:12]}"]
    assert "config.json" in stand_in.downloads()
    assert missing_weights(source.directory) == ["*.safetensors"]
    fetch_weights(source, say=said.append)
    assert "GB" in said[-1]
    here = {path.name: path.read_bytes() for path in Path(source.directory).iterdir()}
    there = {path.name: path.read_bytes() for path in model_dir.iterdir() if path.is_file()}
    assert here == {n: c for n, c in there.items() if not n.endswith((".bin", ".gguf", ".png"))}
    assert model_label(source.directory) == f"{REPO}@{commit[:12]}"
    before = len(stand_in.downloads())
    fetch_weights(locate_model(REPO, "student.model"))
    assert len(stand_in.downloads()) == before


def test_local_directory_wins_and_is_said(stand_in: HubStandIn, model_dir: Path) -> None:
    stand_in.add(REPO, model_dir)
    shutil.copytree(model_dir, REPO)
    said: list[str] = []
    source = locate_model(REPO, "student.model", say=said.append)
    assert (source.directory, source.hub) == (REPO, None)
    assert said == [f"student.model={REPO}: the local directory, not a repository on the hub"]
    fetch_weights(source)
    assert stand_in.requests == []


@pytest.mark.parametrize("name", ["/nowhere/model", "model", "a/b/c"])
def test_a_path_is_not_looked_up(stand_in: HubStandIn, name: str) -> None:
    assert locate_model(name, "student.model").directory == name
    assert stand_in.requests == []


def test_revision_and_moved_branch(stand_in: HubStandIn, model_dir: Path) -> None:
    first = stand_in.add(REPO, model_dir)
    (model_dir / "generation_config.json").write_text("{}")
    second = stand_in.add(REPO, model_dir)
    assert locate_model(f"{REPO}@{first}", "x").hub == HubCommit(
        repo=REPO, revision=first, commit=first
    )
    started = HubCommit(repo=REPO, revision="main", commit=first)
    told: list[str] = []
    source = locate_model(REPO, "x", recorded=started, warn=told.append)
    assert source.hub == started
    assert Path(source.directory).name == first
    assert told == [
        f"{REPO}: main is at commit {second[:12]} now; the run goes on with {first[:12]}, with "
        "which it started"
    ]
    other = HubCommit(repo=REPO, revision="dev", commit=first)  # the config names another one now
    moved = locate_model(REPO, "x", recorded=other, warn=told.append).hub
    assert moved is not None
    assert moved.commit == second
    assert len(told) == 1


@pytest.mark.parametrize("how", ["offline", "no network", "server error"])
def test_without_the_hub_the_cache_is_used(
    stand_in: HubStandIn,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    commit = stand_in.add(REPO, model_dir)
    fetch_weights(locate_model(REPO, "x"))
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no network":
        no_hub(monkeypatch, tmp_path / "cache")
    else:
        stand_in.status = 503
    told: list[str] = []
    source = locate_model(REPO, "x", warn=told.append)
    fetch_weights(source)
    assert source.hub is not None
    assert source.hub.commit == commit
    assert len(told) == 1
    assert "from the cache is used" in told[0]
    recorded = locate_model(REPO, "x", recorded=source.hub, warn=told.append)
    assert recorded == source
    assert len(told) == 1


def gated(stand_in: HubStandIn, model: Path) -> None:
    stand_in.add(REPO, model, access="gated")


def private(stand_in: HubStandIn, model: Path) -> None:
    stand_in.add(REPO, model, access="private")


def dataset(stand_in: HubStandIn, model: Path) -> None:
    stand_in.add(REPO, model, kind="datasets")


def nothing(stand_in: HubStandIn, model: Path) -> None: ...


def failing(stand_in: HubStandIn, model: Path) -> None:
    stand_in.status = 503


def without_config(stand_in: HubStandIn, model: Path) -> None:
    (model / "config.json").unlink()
    stand_in.add(REPO, model)


def other_architecture(stand_in: HubStandIn, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    stand_in.add(REPO, model)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (gated, ["student.model=lab/student is gated", "HF_TOKEN", "accept"]),
        (private, ["no directory here", "no model repository of that name", "private", "HF_TOKEN"]),
        (nothing, ["no directory here", "no model repository of that name"]),
        (dataset, ["is a dataset repository", "expected a model"]),
        (failing, ["no directory here", "cannot be downloaded", "503", "cache"]),
        (without_config, ["no config.json on the hub"]),
        (other_architecture, ["model_type is 'llama'"]),
    ],
)
def test_each_refusal_is_one_line(
    stand_in: HubStandIn,
    model_dir: Path,
    state: Callable[[HubStandIn, Path], None],
    words: list[str],
) -> None:
    state(stand_in, model_dir)
    with pytest.raises(ModelError) as error:
        locate_model(REPO, "student.model")
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("access", ["gated", "private"])
def test_token_opens_what_is_closed(
    stand_in: HubStandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch, access: Any
) -> None:
    stand_in.add(REPO, model_dir, access=access)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch_weights(locate_model(REPO, "x"))
    assert "model.safetensors" in stand_in.downloads()


def test_unknown_revision(stand_in: HubStandIn, model_dir: Path) -> None:
    stand_in.add(REPO, model_dir)
    with pytest.raises(ModelError, match=r"has no revision 'v9'.*branch, a tag or a commit"):
        locate_model(f"{REPO}@v9", "student.model")


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_and_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    no_hub(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError) as error:
        locate_model(REPO, "student.model")
    words = ["no directory here", "cannot be downloaded", str(tmp_path / "cache"), "network"]
    words += ["HF_HUB_OFFLINE is set"] if offline else []
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_weights_that_are_partly_in_the_cache_are_no_model(
    stand_in: HubStandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.add(REPO, model_dir)
    source = locate_model(REPO, "student.model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        fetch_weights(source)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_dir / "one.safetensors").write_bytes(b"")
    assert missing_weights(model_dir) == ["two.safetensors"]


def test_repository_without_safetensors(stand_in: HubStandIn, model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    stand_in.add(REPO, model_dir)
    source = locate_model(REPO, "student.model")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file on the hub \(it has m\.gguf\)"):
        fetch_weights(source)


def test_disk_that_is_too_small(
    stand_in: HubStandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.add(REPO, model_dir)
    source = locate_model(REPO, "student.model")
    usage = shutil.disk_usage(model_dir)._replace(free=100)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"needs 0\.\d GB in .*0\.0 GB free.*HF_HOME"):
        fetch_weights(source)
    assert "model.safetensors" not in stand_in.downloads()


def test_disk_that_fills_up(
    stand_in: HubStandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.add(REPO, model_dir)
    source = locate_model(REPO, "student.model")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_download", full)
    with pytest.raises(ModelError, match=r"cannot be saved in .*No space left.*HF_HOME"):
        fetch_weights(source)


def test_download_goes_on_where_it_was_broken_off(
    stand_in: HubStandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.add(REPO, model_dir)
    source = locate_model(REPO, "student.model")
    stand_in.cuts = 1
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a broken one
    monkeypatch.setattr(hub, "_REPORT_EVERY_S", 0.05)
    said: list[str] = []
    fetch_weights(source, say=said.append)
    size = (model_dir / "model.safetensors").stat().st_size
    assert stand_in.ranges == [f"bytes={size // 2 // 1000 * 1000}-"]
    whole = (model_dir / "model.safetensors").read_bytes()
    assert (Path(source.directory) / "model.safetensors").read_bytes() == whole
    assert any(" of 0.00 GB" in line for line in said)


def test_dataset_is_found_by_its_commit(
    stand_in: HubStandIn, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = stand_in.add(REPO, model_dir, kind="datasets")
    found = locate_dataset(REPO, None, "prompts.path")
    assert found == HubCommit(repo=REPO, revision="main", commit=commit)
    newer = stand_in.add(REPO, model_dir)
    told: list[str] = []
    assert locate_dataset(REPO, None, "x", recorded=found, warn=told.append) == found
    assert newer[:12] in told[0]
    with pytest.raises(DataError, match=r"has no revision 'v9'"):
        locate_dataset(REPO, "v9", "prompts.path")
    stand_in.repositories.clear()
    with pytest.raises(DataError, match=r"no dataset repository of that name"):
        locate_dataset(REPO, None, "prompts.path")
    no_hub(monkeypatch, tmp_path / "cache")
    assert locate_dataset(REPO, None, "x", recorded=found) == found
    assert locate_dataset(REPO, None, "x") is None
    assert locate_dataset(str(model_dir), None, "x") is None


def test_label_of_a_directory_is_its_name() -> None:
    assert model_label("/models/student") == "student"
