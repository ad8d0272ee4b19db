"""Files that exist whole or not at all, and what may be replaced."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qwen3_distill.errors import DistillError, RunFolderError

_LITTER = re.compile(
    r"\.DS_Store|\.localized|\._.*|Thumbs\.db|desktop\.ini|lost\+found|\.directory|\.nfs[0-9a-f]+"
)
"""Names that operating systems and file managers leave in folders."""
_DESCRIPTOR = re.compile(r"/dev/(?:(stdout)|(stderr)|fd/(\d+))|/proc/self/fd/(\d+)")


@contextmanager
def atomic_path(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; its file replaces ``path`` at the end.

    Readers see the old file or the whole new one, even after a power cut: the file and its folder
    are synced. When the block raises, the temporary file is removed and ``path`` keeps
    its old content. The temporary path is absolute and its name ends like ``path``, because some
    writers choose the format by the suffix, and expand ``~`` or take ``a:b`` for a URL.

    Args:
        private: only this user may read the file.

    A symbolic link stays and its target is replaced. A replaced file keeps its permissions. What
    is no regular file (a device, a pipe) is not replaced: the finished content is written to it.

    Raises:
        RunFolderError: the file cannot be written (folder missing, no permission, disk full, a
            folder or a disk, write-protected, a loop of links).
    """
    target = Path(path)
    try:
        file = _replaceable(target)
        if file is None:
            with _written_directly(target) as temporary:
                yield temporary
            return
        with _replaced(file, private) as temporary:
            yield temporary
    except DistillError:
        raise
    except OSError as error:
        raise RunFolderError(
            f"cannot write {target}: {error}. Expected an existing, writable folder with free "
            "space; make the folder, free space or choose another path"
        ) from error


def is_replaceable(path: str | Path) -> bool:
    """Return whether `atomic_path` replaces ``path``; else it writes to the device or pipe.

    Raises:
        OSError: ``path`` is a folder, a socket, a disk or a loop of links, or may not be written.
    """
    return _replaceable(Path(path)) is not None


def _replaceable(target: Path) -> Path | None:
    """Return the absolute path of the file to replace, links followed; None to write directly."""
    if _DESCRIPTOR.fullmatch(str(target)):
        return None
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:  # new, or a link whose target is still to be made
        return Path(os.path.realpath(target))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, "is a disk or a socket, expected a file")
    if not os.access(target, os.W_OK):  # a rename would replace a write-protected file
        raise PermissionError(errno.EACCES, "is write-protected")
    return Path(os.path.realpath(target)) if stat.S_ISREG(mode) else None


@contextmanager
def _replaced(file: Path, private: bool) -> Iterator[Path]:
    temporary = file.with_name(f".tmp-{secrets.token_hex(6)}-{file.name}")
    try:
        if private:
            temporary.touch(mode=0o600)
        yield temporary
        with suppress(FileNotFoundError):
            kept = stat.S_IMODE(file.stat().st_mode) & (0o700 if private else 0o777)
            temporary.chmod(kept)
        sync(temporary)
        try:
            os.replace(temporary, file)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a mount point, as a file given to a container is
                raise
            shutil.copyfile(temporary, file)
            sync(file)
        sync(file.parent)
    finally:
        with suppress(OSError):  # after the rename there is nothing left to remove
            temporary.unlink()


@contextmanager
def _written_directly(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qwen3-distill-") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        with temporary.open("rb") as source, _opened(target) as sink:
            shutil.copyfileobj(source, sink)


def _opened(target: Path) -> IO[bytes]:
    """Open a device or pipe; ``/dev/stdout`` and its like go on where the descriptor stands."""
    if found := _DESCRIPTOR.fullmatch(str(target)):
        stdout, stderr, *numbers = found.groups()
        number = 1 if stdout else 2 if stderr else int(next(n for n in numbers if n))
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # what was printed before comes first
        return os.fdopen(os.dup(number), "wb")
    return os.fdopen(os.open(target, os.O_WRONLY), "wb")


def content_of(folder: Path) -> list[str]:
    """List the names in a folder, sorted; none if there is no such folder.

    Names that operating systems leave everywhere (``.DS_Store``, ``lost+found``) do not count.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not _LITTER.fullmatch(name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def check_writable(path: str | Path) -> None:
    """Check, before long work, that ``path`` can be written. Makes its folder.

    Raises:
        RunFolderError: the file could not be written.
    """
    target = Path(path)
    try:
        file = _replaceable(target)
        if file is None:
            return
        if not target.is_symlink():  # where a link leads is not ours to make
            file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise RunFolderError(
            f"{target} could not be written ({error}); choose another --out or output_dir"
        ) from error


def write_json_atomic(path: str | Path, obj: Any, *, private: bool = False) -> None:
    """Write ``obj`` as indented UTF-8 JSON through `atomic_path`.

    Args:
        private: only this user may read the file.

    Raises:
        RunFolderError: the file cannot be written.
        ValueError: ``obj`` holds NaN or an infinity, which are not JSON.
        TypeError: ``obj`` holds something else that JSON cannot represent.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def directory_sha256(path: Path) -> str:
    """Return the SHA-256 of a directory's files, by name and content, as hexadecimal digits.

    Hidden files and folders and the caches of `datasets` (``cache-...``) are no content.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        is_content = not any(part.startswith(".") for part in name.parts)
        if is_content and file.is_file() and not file.name.startswith("cache-"):
            digest.update(f"{name.as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file or a directory written to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
