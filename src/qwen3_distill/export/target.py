"""The folder an export is written to: whole or not at all, and never over anybody else's files."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import qwen3_distill
from qwen3_distill.errors import DistillError, RunFolderError
from qwen3_distill.utils.json_text import read_json

RECORD = "export.json"
_MADE_BY = "qwen3-distill export"


def check_target(target: Path, sources: Iterable[Path]) -> Path:
    """Return the resolved target folder, if an export may be written there.

    It may where nothing is, in an empty folder, and in place of an earlier export that holds no
    file but its own.

    Args:
        sources: the run folder and its models, which stay unchanged.

    Raises:
        RunFolderError: the target has content that is not an export, or is, lies in or holds one
            of the sources.
    """
    folder = target.expanduser().resolve()
    for source in (path.resolve() for path in sources):
        if folder == source or source in folder.parents or folder in source.parents:
            raise RunFolderError(
                f"{target} and {source} overlap; an export changes nothing that the run was made "
                "of. Choose another --out"
            )
    if os.path.lexists(folder) and not folder.is_dir():
        raise RunFolderError(f"{target} is not a folder; choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and (reason := _not_ours(folder)):
        raise RunFolderError(
            f"{target} has content and is not an export of this command: {reason}. Choose "
            "another --out, or move what is there"
        )
    return folder


@contextmanager
def written_whole(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder next to ``folder``; it takes that place when the block ends.

    Every file is flushed first, and listed in `RECORD`. When the block raises, the temporary
    folder is removed and ``folder`` keeps what it had.

    Args:
        record: what `RECORD` says of the export; may be filled inside the block.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    temporary = folder.with_name(f".unfinished-{secrets.token_hex(4)}-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _write_record(temporary, record)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        _replace(folder, temporary)
        _flush(folder.parent)
    except DistillError:
        raise
    except OSError as error:
        raise RunFolderError(
            f"cannot write {folder}: {error.strerror or error}; free space, or choose another "
            "--out whose parent folder is writable"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_ours(folder: Path) -> str | None:
    """Why the content may not be replaced; None where it is an earlier export, all of it."""
    try:
        record = read_json(folder / RECORD)
        if record["made_by"] != _MADE_BY:
            raise ValueError
        listed = {RECORD, *record["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return f"it has no {RECORD} of this command"
    strange = sorted(_files(folder) - listed)
    return f"{strange[0]} is not of the export that was there" if strange else None


def _files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    content = {
        "made_by": _MADE_BY,
        "version": qwen3_distill.__version__,
        **record,
        "files": sorted(_files(folder)),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def _replace(folder: Path, temporary: Path) -> None:
    """Put ``temporary`` in the place of ``folder``; what was there comes back if that fails."""
    if not folder.exists() or not any(folder.iterdir()):
        temporary.rename(folder)  # over an empty folder too
        return
    old = folder.with_name(f".old-{secrets.token_hex(4)}-{folder.name}")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        with suppress(OSError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
