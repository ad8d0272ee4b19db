"""Finds models by hub id and brings them to a local directory, through huggingface_hub. No torch.

`locate_model` turns a name into a directory with everything but the weights; `fetch_weights` adds
the weights. Both use huggingface_hub's cache, token and offline mode, and continue a download that
was broken off. Everything else in this package sees directories only.
"""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_distill.errors import DataError, DistillError, ModelError
from qwen3_distill.modeling.directory import check_model_dir
from qwen3_distill.utils.json_text import read_json

Say = Callable[[str], None]
RepoType = Literal["model", "dataset"]

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_SNAPSHOT = re.compile(r"models--(?P<repo>.+)/snapshots/(?P<commit>[0-9a-f]{40})")
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model")
"""Config, tokenizer and template files, at the top of a repository."""
_WEIGHTS = ("*.safetensors",)
_ELSEWHERE = ("*/*", "consolidated*")
"""Files in folders (``original/``, ``onnx/``) and another layout of the same weights."""
_INFO_TIMEOUT_S = 10.0
_REPORT_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class HubCommit:
    """One commit of a repository."""

    repo: str
    revision: str
    """The branch, tag or commit that the user asked for."""
    commit: str

    def record(self) -> dict[str, str]:
        """Return the commit as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.repo} at commit {self.commit[:12]}"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was named, and the directory to read it from."""

    setting: str
    """The setting that named it, e.g. ``student.model``."""
    directory: str
    hub: HubCommit | None = None
    """None: a directory of the user's."""


def parse_id(name: str) -> tuple[str, str] | None:
    """Split ``namespace/name[@revision]`` into id and revision; None where it is no hub id."""
    repo, at, revision = name.partition("@")
    if not _ID.fullmatch(repo) or ".." in repo or (at and not revision):
        return None
    return repo, revision or "main"


def locate_model(
    name: str,
    setting: str,
    *,
    recorded: HubCommit | None = None,
    say: Say = lambda message: None,
    warn: Say = lambda message: None,
) -> ModelSource:
    """Return the directory of a model, with config and tokenizer downloaded if it is a hub id.

    A directory of that name is used, whatever the hub has. A name that cannot be a hub id is
    returned unchanged.

    Args:
        recorded: the commit that an earlier start of the run used; it is used again.
        say: told which reading was chosen.
        warn: told that the branch has moved, or that the hub was not asked.

    Raises:
        ModelError: the name is neither a directory nor an accessible repository of a Qwen3 model.
    """
    parsed = parse_id(name)
    if parsed is None:
        return ModelSource(setting=setting, directory=name)
    if Path(name).exists():
        say(f"{setting}={name}: the local directory, not a repository on the hub")
        return ModelSource(setting=setting, directory=name)
    repo, revision = parsed
    if recorded is not None and (recorded.repo, recorded.revision) != parsed:
        recorded = None
    with _explained(setting, repo, revision, "model"):
        found = _resolve(repo, revision, recorded, warn)
        directory = _download(found, _DESCRIPTION)
    say(f"{setting}: {found}")
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{setting}={name} has no config.json on the hub, expected a model in the Hugging "
            "Face layout; give the repository with the original weights"
        )
    check_model_dir(directory, weights=False)
    return ModelSource(setting=setting, directory=str(directory), hub=found)


def fetch_weights(source: ModelSource, say: Say = lambda message: None) -> None:
    """Download the weights of a located model into its directory; a local model needs nothing.

    Raises:
        ModelError: the repository has no safetensors weights, access is refused, the hub cannot be
            reached or the disk is too small.
    """
    hub = source.hub
    if hub is None or not missing_weights(source.directory):
        return
    with _explained(source.setting, hub.repo, hub.revision, "model"):
        missing_bytes = _bytes_to_fetch(source, hub)
        with _reported(hub, Path(source.directory), missing_bytes, say):
            _download(hub, (*_DESCRIPTION, *_WEIGHTS))
    if missing := missing_weights(source.directory):
        raise ModelError(
            f"{source.setting}={hub.repo} has no {missing[0]} at commit {hub.commit[:12]}, "
            "expected weights as safetensors; give a repository that has them"
        )


def missing_weights(directory: str | Path) -> list[str]:
    """List the weight files that a directory should have and lacks."""
    folder = Path(directory)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            names = set(read_json(index)["weight_map"].values())
            return sorted(name for name in names if not (folder / name).is_file())
    return [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]


def locate_dataset(
    name: str,
    revision: str | None,
    setting: str,
    *,
    recorded: HubCommit | None = None,
    warn: Say = lambda message: None,
) -> HubCommit | None:
    """Return the commit of a dataset on the hub; None where ``name`` is a directory or no hub id.

    Raises:
        DataError: there is no such dataset or revision, access is refused, or neither the hub nor
            the cache has it.
    """
    if parse_id(name) is None or "@" in name or Path(name).exists():
        return None
    wanted = revision or "main"
    if recorded is not None and (recorded.repo, recorded.revision) != (name, wanted):
        recorded = None
    with _explained(setting, name, wanted, "dataset"):
        try:
            info = _api().dataset_info(name, revision=wanted, timeout=_INFO_TIMEOUT_S)
        except Exception as error:
            if _unreachable(error):  # `datasets` has a cache of its own
                return recorded
            raise
    found = HubCommit(repo=name, revision=wanted, commit=str(info.sha))
    return _kept(recorded, found, warn)


def is_snapshot(directory: str | Path) -> bool:
    """Return whether a directory is a commit in huggingface_hub's cache."""
    return _SNAPSHOT.search(Path(directory).as_posix()) is not None


def model_label(directory: str | Path) -> str:
    """Return the short name of a model directory: a hub id for a snapshot, else the folder's."""
    found = _SNAPSHOT.search(Path(directory).as_posix())
    if found is None:
        return Path(directory).name
    return f"{found['repo'].replace('--', '/', 1)}@{found['commit'][:12]}"


# --- The hub --------------------------------------------------------------------------------------


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="qwen3-distill")


def _resolve(repo: str, revision: str, recorded: HubCommit | None, warn: Say) -> HubCommit:
    """Return the commit to use: the recorded one, else what the revision is on the hub now.

    Where the hub cannot be reached, the newest commit of the revision in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        info = _api().model_info(repo, revision=revision, timeout=_INFO_TIMEOUT_S)
    except Exception as error:
        if not _unreachable(error):
            raise
        if recorded is not None:
            return recorded
        folder = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
        found = HubCommit(repo=repo, revision=revision, commit=Path(folder).name)
        warn(f"the hub was not asked ({_first_line(error)}): {found} from the cache is used")
        return found
    found = HubCommit(repo=repo, revision=revision, commit=str(info.sha))
    if recorded is not None:
        return _kept(recorded, found, warn)
    # By its name, so that the cache knows the branch when the hub cannot be asked.
    with _quiet():
        folder = snapshot_download(repo, revision=revision, allow_patterns=["config.json"])
    return HubCommit(repo=repo, revision=revision, commit=Path(folder).name)


def _kept(recorded: HubCommit | None, found: HubCommit, warn: Say) -> HubCommit:
    if recorded is None or recorded == found:
        return found
    warn(
        f"{found.repo}: {found.revision} is at commit {found.commit[:12]} now; the run goes on "
        f"with {recorded.commit[:12]}, with which it started"
    )
    return recorded


def _download(found: HubCommit, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    with _quiet():
        folder = snapshot_download(
            found.repo,
            revision=found.commit,
            allow_patterns=list(patterns),
            ignore_patterns=list(_ELSEWHERE),
            library_name="qwen3-distill",
        )
    return Path(folder)


def _bytes_to_fetch(source: ModelSource, hub: HubCommit) -> int:
    """Return the size of the weights that are not there yet; 0 where the hub does not say.

    Raises:
        ModelError: the disk of the cache has less room, or the repository has no safetensors.
    """
    from huggingface_hub import constants

    try:
        info = _api().model_info(
            hub.repo, revision=hub.commit, files_metadata=True, timeout=_INFO_TIMEOUT_S
        )
    except Exception as error:
        if _unreachable(error):
            return 0  # the download says what is missing
        raise
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if not wanted:
        others = sorted(name for name in files if name.endswith((".bin", ".gguf", ".pt", ".pth")))
        raise ModelError(
            f"{source.setting}={hub.repo} has no *.safetensors file on the hub"
            f"{' (it has ' + others[0] + ')' if others else ''}, expected weights as safetensors; "
            "give a repository that has them"
        )
    folder = Path(source.directory)
    missing = sum(files[name] for name in wanted if not (folder / name).is_file())
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(cache).free
    if missing > free:
        raise ModelError(
            f"{source.setting}={hub.repo} needs {missing / 1e9:.1f} GB in {cache}, which has "
            f"{free / 1e9:.1f} GB free; free space, or set HF_HOME to another disk"
        )
    return missing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Switch huggingface_hub's progress bars off: they write over this package's own."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _reported(hub: HubCommit, directory: Path, total: int, say: Say) -> Iterator[None]:
    """Say every few seconds how much of ``total`` bytes has been downloaded."""
    blobs = directory.parents[1] / "blobs"
    before, ended = _size(blobs), threading.Event()

    def report() -> None:
        while not ended.wait(_REPORT_EVERY_S):
            done = min(total, max(0, _size(blobs) - before))
            say(f"downloading {hub}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    thread = threading.Thread(target=report, daemon=True)
    if total:
        say(f"downloading {hub}: {total / 1e9:.2f} GB")
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if total:
            thread.join()


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):  # a file is renamed when it is whole
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


# --- Errors ---------------------------------------------------------------------------------------


def _unreachable(error: Exception) -> bool:
    """Return whether the hub did not answer: offline mode, no network, or an error of its own."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (429, *range(500, 600))
    if isinstance(error, LocalEntryNotFoundError):
        return False
    # huggingface_hub's HTTP library, whose errors are no OSError, has changed its name.
    is_transport = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return is_transport or isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError)


@contextlib.contextmanager
def _explained(setting: str, repo: str, revision: str, kind: RepoType) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line with what to change."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        raise _explain(error, f"{setting}={repo}", revision, kind, repo) from error


def _explain(error: Exception, name: str, revision: str, kind: RepoType, repo: str) -> DistillError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    refused = ModelError if kind == "model" else DataError
    hub = constants.ENDPOINT
    neither = f"{name} is no directory here (working directory {Path.cwd()}), and "
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        return refused(
            f"{name} is gated: {hub} lets only accounts read it that accepted its terms; accept "
            f"them at {hub}/{repo}, then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return refused(
            f"{name} has no revision {revision!r} on {hub}; give a branch, a tag or a commit of it"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        other: RepoType = "dataset" if kind == "model" else "model"
        if _exists(repo, other):
            return refused(
                f"{name} is a {other} repository on {hub}, expected a {kind}; change the id"
            )
        return refused(
            f"{neither}{hub} has no {kind} repository of that name, or it is private: correct the "
            "path or the id, or set HF_TOKEN"
        )
    if isinstance(error, LocalEntryNotFoundError) or _unreachable(error):
        # Where the cache was asked instead, what went wrong before is the cause or the context.
        reason = _first_line(error.__cause__ or error.__context__ or error)
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        return refused(
            f"{neither}cannot be downloaded from {hub} ({reason}), and the cache "
            f"{constants.HF_HUB_CACHE} does not hold all of it; correct the path, or download it "
            "once with a network"
        )
    if isinstance(error, OSError) and status is None:
        return refused(
            f"{name} cannot be saved in {constants.HF_HUB_CACHE}: {error.strerror or error}; free "
            "space, or set HF_HOME to another disk. The same command goes on from there"
        )
    return refused(
        f"{name} cannot be downloaded from {hub}: {_first_line(error)}; try again, or give a "
        "local directory"
    )


def _exists(repo: str, kind: RepoType) -> bool:
    with contextlib.suppress(Exception):  # only makes the message more exact
        _api().repo_info(repo, repo_type=kind, timeout=_INFO_TIMEOUT_S)
        return True
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
