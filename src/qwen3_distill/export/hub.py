"""Pushing an export to the Hugging Face Hub, and what can go wrong there in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from qwen3_distill.errors import ConfigError, EngineError

_TRANSPORT_ERRORS = (errors.HTTPError, OSError)  # pyright: ignore[reportPrivateImportUsage]
"""Error types of the hub's HTTP client, which is another library from version to version."""


def check_push(repo: str) -> None:
    """Before the export is made: the name is one, and there is a token that the hub accepts.

    Raises:
        ConfigError: no repository name, or no token.
        EngineError: the hub was not reached, or refuses the token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {repo}: not a repository name ({error}); expected NAMESPACE/NAME"
        ) from None
    if get_token() is None:
        raise ConfigError(
            f"--push {repo}: no token for the Hugging Face Hub; log in with `hf auth login`, or "
            "set HF_TOKEN to a token with write access"
        )
    with _hub_errors(repo, "nothing was written"):
        HfApi().whoami()


def push(folder: Path, repo: str) -> str:
    """Upload the folder. A repository that does not exist is made, and is private.

    Returns:
        The address of the last commit.

    Raises:
        EngineError: the hub was not reached, or refuses; the export stays where it is.
    """
    with _hub_errors(repo, f"the export is in {folder}; the same command pushes it again"):
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Export of qwen3-distill"
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(repo: str, outcome: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled:
        raise EngineError(
            f"--push {repo}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it. {outcome}"
        ) from None
    except HfHubHTTPError as error:
        raise EngineError(f"--push {repo}: {_refusal(error)}. {outcome}") from None
    except _TRANSPORT_ERRORS as error:
        raise EngineError(
            f"--push {repo}: the hub was not reached ({_line(error)}); check the network, or "
            f"HF_ENDPOINT. {outcome}"
        ) from None
    except ValueError as error:  # the hub's judgement of the card's front matter, for one
        raise EngineError(f"--push {repo}: the hub refused it: {_line(error)}. {outcome}") from None


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the hub does not accept the token; log in again with `hf auth login`"
    if status == 403:
        return (
            f"no permission to write there ({_line(error)}); use a token with write access, or a "
            "repository of your own"
        )
    if status == 404:
        return "the hub has no such repository or namespace, or the token may not see it"
    return f"the hub answered with status {status}: {_line(error)}"


def _line(error: Exception) -> str:
    """The error's text on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
