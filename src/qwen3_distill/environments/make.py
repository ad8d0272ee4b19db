"""Make the virtual environment of an engine, or find the one that is there; print its interpreter.

    python3 src/qwen3_distill/environments/make.py sglang-cpu      # in the repository
    python3 -m qwen3_distill.environments.make sglang-cpu          # where the package is installed

Standard library only. The folder NAME beside this file says what to install: a lock file (exactly
these packages, without dependencies) or requirements (resolved by pip). Environments lie in a cache
folder under a name that changes with their content and with the Python version, so none is ever
updated in place. An environment appears there whole or not at all. Progress goes to stderr.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
    try:
        print(interpreter(arguments.name, arguments.python, arguments.cache))
    except BuildError as error:
        sys.exit(f"error: {error}")


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
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{target.name}.lock"):
        if not target.exists():
            _build(name, python, target)
    return target / "bin" / "python"


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


def _build(name: str, python: str, target: Path) -> None:
    """Make the environment in a temporary folder next to ``target``, then rename it."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed; the lock is ours
    _say(f"making {target.name} in {target.parent} (a minute or two, some gigabytes)")
    try:
        _run([python, "-m", "venv", str(partial)])
        _install(name, partial / "bin" / "python")
        _copy_extras(name, partial)
        _check(name, partial / "bin" / "python")
        _compile(partial, target)
        _point_scripts_to(partial, target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _say(f"made {target}")


def _install(name: str, python: Path) -> None:
    lock = ENVIRONMENTS / name / "requirements.lock"
    if lock.is_file():
        install_lock(lock, python)
    else:
        _run([*_pip_install(python), "-r", str(ENVIRONMENTS / name / "requirements.txt")])


def _pip_install(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def install_lock(lock: Path, python: Path) -> None:
    """Install a lock file's packages into an interpreter: exactly these, without dependencies.

    Raises:
        BuildError: pip failed.
    """
    pip = [*_pip_install(python), "--no-deps", "--no-compile"]
    (torch,) = [line for line in lock.read_text().splitlines() if line.startswith("torch==")]
    # PyTorch's CPU builds are not on PyPI. Where pip is set up to find them, its own index is not
    # needed; elsewhere it is asked for this one package.
    with contextlib.suppress(BuildError):
        _run([*pip, torch])
        _run([*pip, "-r", str(lock)])
        return
    _say(f"once more, {torch} from {TORCH_CPU_INDEX}")
    _run([*pip, "--index-url", TORCH_CPU_INDEX, torch])
    _run([*pip, "-r", str(lock)])


def _copy_extras(name: str, environment: Path) -> None:
    (packages,) = environment.glob("lib/python*/site-packages")
    for extra in RECIPES[name].extras:
        source = ENVIRONMENTS / "extras" / extra
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, packages / extra, ignore=ignored)
        else:
            shutil.copy(source, packages / extra)


def _check(name: str, python: Path) -> None:
    """Import the engine, in a folder that it may write its caches into."""
    with tempfile.TemporaryDirectory() as folder:
        _run([str(python), "-c", RECIPES[name].check], folder=folder)


def _compile(partial: Path, target: Path) -> None:
    """Compile all packages to byte-code, on all cores.

    Where Python may not write byte-code, every start of an engine would compile again, which takes
    half a minute and more.
    """
    (packages,) = partial.glob("lib/python*/site-packages")
    paths = ["-s", str(partial), "-p", str(target)]  # what a traceback shows
    python = str(partial / "bin" / "python")
    command = [python, "-m", "compileall", "-q", "-f", "-j", "0", *paths, str(packages)]
    # Some packages hold files of other Python versions; those fail and nobody imports them.
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _point_scripts_to(partial: Path, target: Path) -> None:
    """Write the final path of the interpreter into the scripts, which name the temporary one."""
    for script in (partial / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        moved = content.replace(os.fsencode(partial), os.fsencode(target))
        if moved != content and b"\0" not in content:
            script.write_bytes(moved)


def _run(command: Sequence[str], folder: str | None = None) -> None:
    """Run a command with its output on stderr."""
    done = subprocess.run(command, stdout=sys.stderr, cwd=folder, check=False)
    if done.returncode != 0:
        raise BuildError(f"failed with status {done.returncode}: {' '.join(command)}")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let one build run at a time; the second finds what the first made."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
