"""Files that exist whole or not at all."""

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen3_distill.errors import DistillError, RunFolderError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; its file replaces ``path`` at the end.

    Readers see the old file or the whole new one, even after a power cut: the file and its folder
    are synced. When the block raises, the temporary file is removed and ``path`` keeps
    its old content. The temporary name ends like ``path``, because some writers choose the
    format by the suffix.

    Raises:
        RunFolderError: the file cannot be written (folder missing, no permission, disk full).
    """
    target = Path(path)
    temporary = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except DistillError:
        raise
    except OSError as error:
        raise RunFolderError(
            f"cannot write {target}: {error}. Expected an existing, writable folder with free "
            "space; make the folder, free space or choose another path"
        ) from error
    finally:
        with suppress(OSError):  # after the rename there is nothing left to remove
            temporary.unlink()


def check_writable(path: str | Path) -> None:
    """Check, before long work, that ``path`` can be written. Makes its folder.

    Raises:
        RunFolderError: the file could not be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise RunFolderError(
            f"{target} could not be written ({error}); choose another --out or output_dir"
        ) from error


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented UTF-8 JSON through `atomic_path`.

    Raises:
        RunFolderError: the file cannot be written.
        ValueError: ``obj`` holds NaN or an infinity, which are not JSON.
        TypeError: ``obj`` holds something else that JSON cannot represent.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have a file or a directory written to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
