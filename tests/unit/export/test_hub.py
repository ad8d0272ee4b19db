"""Pushing an export to a stand-in of the hub, and one clear line for what goes wrong."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from tests.unit.export.hub_stand_in import TOKEN, HubStandIn, serve_hub
from tests.unit.export.support import call_export, contents, refused

REPO = "me/student"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    huggingface_hub.utils.disable_progress_bars()
    with serve_hub() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        yield served
        huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()


def test_a_push_makes_a_private_repository_with_the_exports_files(
    hub: HubStandIn, full_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = call_export(full_run, "--to", "hf", "--out", out, "--push", REPO)
    assert f"pushed: {hub.url}/{REPO}/commit/abc" in said
    assert hub.private == {REPO: True}
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_repository_that_is_there_keeps_its_visibility(
    hub: HubStandIn, full_run: Path, tmp_path: Path
) -> None:
    hub.private[REPO] = False
    call_export(full_run, "--to", "hf", "--out", tmp_path / "out", "--push", REPO)
    assert hub.private == {REPO: False}
    assert "README.md" in hub.files


def test_without_a_token_nothing_is_written_or_asked(
    hub: HubStandIn, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    arguments = (full_run, "--to", "hf", "--out", tmp_path / "out", "--push", REPO)
    refused(*arguments, words=("no token", "hf auth login", "HF_TOKEN"))
    assert not (tmp_path / "out").exists()
    assert not hub.requests


@pytest.mark.parametrize("repo", ["a/b/c", "me/", "-x", "me/st udent"])
def test_what_is_no_repository_name_is_refused(
    hub: HubStandIn, full_run: Path, tmp_path: Path, repo: str
) -> None:
    arguments = (full_run, "--to", "hf", "--out", tmp_path / "out", f"--push={repo}")
    refused(*arguments, words=("not a repository name", "NAMESPACE/NAME"))
    assert not (tmp_path / "out").exists()


def test_a_token_the_hub_does_not_know_is_found_out_before_the_export(
    hub: HubStandIn, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    arguments = (full_run, "--to", "hf", "--out", tmp_path / "out", "--push", REPO)
    error = refused(*arguments, words=("does not accept the token", "hf auth login"))
    assert "\n" not in str(error)
    assert not (tmp_path / "out").exists()


def test_no_network_is_found_out_before_the_export(
    hub: HubStandIn, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    arguments = (full_run, "--to", "hf", "--out", tmp_path / "out", "--push", REPO)
    error = refused(*arguments, words=("not reached", "HF_ENDPOINT", "nothing was written"))
    assert "\n" not in str(error)
    assert not (tmp_path / "out").exists()


def test_offline_mode_is_said(
    hub: HubStandIn, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments = (full_run, "--to", "hf", "--out", tmp_path / "out", "--push", REPO)
    refused(*arguments, words=("HF_HUB_OFFLINE",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/repos/create", 403, ("no permission", "write access")),
        (f"/api/models/{REPO}/commit", 403, ("no permission", "write access")),
        (f"/api/models/{REPO}/preupload", 404, ("no such repository",)),
        ("/api/validate-yaml", 400, ("bad front matter",)),
        ("/api/repos/create", 400, ("status 400",)),
    ],
)
def test_a_refused_push_leaves_the_export_and_says_so(
    hub: HubStandIn,
    full_run: Path,
    tmp_path: Path,
    path: str,
    status: int,
    words: tuple[str, ...],
) -> None:
    hub.refuse[path] = (status, "bad front matter")
    out = tmp_path / "out"
    arguments = (full_run, "--to", "hf", "--out", out, "--push", REPO)
    error = refused(*arguments, words=(*words, f"the export is in {out}", REPO))
    assert "\n" not in str(error)
    kept = contents(out)
    assert "README.md" in kept
    hub.refuse.clear()
    call_export(*arguments)
    assert set(hub.files) == set(kept)
