"""The engines' environments: exactly pinned, made whole or not at all, made once."""

import importlib.util
import marshal
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOME = ROOT / "src" / "qwen3_distill" / "environments"
LOCKS = sorted(HOME.glob("*/requirements.lock"))
CUDA = sorted(HOME.glob("*-cuda/requirements.txt"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = HOME / "make.py"
    spec = importlib.util.spec_from_file_location("make_environment", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pins(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines)  # type: ignore[union-attr]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.parent.name)
def test_lock_pins_everything_exactly(lock: Path) -> None:
    found = pins(lock.read_text())
    assert len(found) > (20 if lock.parent.name == "transformers4-cpu" else 50)
    assert "torch" in found


def test_every_recipe_has_its_files_and_every_folder_its_recipe(script: ModuleType) -> None:
    folders = {p.parent.name for p in HOME.glob("*/requirements.*")}
    assert folders == set(script.RECIPES)
    for recipe in script.RECIPES.values():
        assert all((HOME / "extras" / extra).exists() for extra in recipe.extras)


@pytest.mark.parametrize("file", CUDA, ids=lambda file: file.parent.name)
def test_cuda_environments_have_the_versions_of_the_extras(file: Path) -> None:
    engine = file.parent.name.removesuffix("-cuda")
    wanted = [line for line in file.read_text().splitlines() if line.startswith(engine)]
    (extra,) = re.findall(rf"^{engine} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.findall(r'"([^"]+)"', extra) == wanted


def test_a_wheel_holds_every_file_that_is_not_a_module() -> None:
    package = ROOT / "src" / "qwen3_distill"
    (data,) = re.findall(
        r"^qwen3_distill = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    packed = {file for glob in re.findall(r'"([^"]+)"', data) for file in package.glob(glob)}
    # setuptools takes the modules of packages by itself, and extras is no package.
    extras = HOME / "extras"
    needed = {
        file
        for file in package.rglob("*")
        if file.is_file()
        and file.suffix not in {".md", ".pyc"}
        and (file.suffix != ".py" or extras in file.parents)
    }
    assert {p.name for p in needed} > {"report.html.j2", "py.typed", "sitecustomize.py"}
    assert needed - packed == set()


# --- Making one ---------------------------------------------------------------------------------


@pytest.fixture
def recipe(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe called `small`: nothing to install, one extra; the folder of its files."""
    folder = tmp_path / "environments"
    (folder / "small").mkdir(parents=True)
    (folder / "small" / "requirements.txt").write_text("# nothing\n")
    (folder / "extras").mkdir()
    (folder / "extras" / "helper.py").write_text("ANSWER = 42\n")
    monkeypatch.setattr(script, "ENVIRONMENTS", folder)
    made = script.Recipe("import helper; assert helper.ANSWER == 42", ("helper.py",))
    monkeypatch.setitem(script.RECIPES, "small", made)
    return folder


def environments(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.is_dir())


def test_environment_is_made_once_also_after_a_killed_build_and_anew_when_its_files_change(
    script: ModuleType, recipe: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    tag = script.python_tag(sys.executable)
    name = f"small-{script.digest('small', tag)}"
    (cache / f".{name}.partial" / "lib" / "python3.0").mkdir(parents=True)
    python = script.interpreter("small", sys.executable, cache)
    assert python.is_file()
    (python.parents[1] / "mark").touch()
    assert script.interpreter("small", sys.executable, cache) == python
    assert (python.parents[1] / "mark").exists(), "made a second time"
    # Where the path is too long for the first line, pip's script begins with a shell that runs it.
    pip = (python.parent / "pip").read_text()
    assert str(python) in "".join(pip.splitlines(keepends=True)[:3])
    assert ".partial" not in pip, "scripts point to the temporary place"
    (compiled,) = python.parents[1].glob("lib/python*/site-packages/__pycache__/helper.*.pyc")
    code = marshal.loads(compiled.read_bytes()[16:])
    assert code.co_filename.startswith(str(python.parents[1])), "tracebacks name another place"
    assert environments(cache) == [name]
    (recipe / "extras" / "helper.py").write_text("ANSWER = 42  # changed\n")
    assert name != f"small-{script.digest('small', tag)}"


def test_environment_that_does_not_work_is_not_left_behind(
    script: ModuleType, recipe: Path, tmp_path: Path
) -> None:
    (recipe / "extras" / "helper.py").write_text("ANSWER = 41\n")
    cache = tmp_path / "cache"
    with pytest.raises(script.BuildError, match="failed with status 1"):
        script.interpreter("small", sys.executable, cache)
    assert environments(cache) == []


def test_old_or_missing_python_is_refused(script: ModuleType, tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\necho 3 10 linux-x86_64\n")
    old.chmod(0o755)
    with pytest.raises(script.BuildError, match=r"Python 3\.10.*3\.11 or newer"):
        script.interpreter("small", str(old), tmp_path)
    with pytest.raises(script.BuildError, match="cannot be run"):
        script.interpreter("small", str(tmp_path / "none"), tmp_path)


@pytest.mark.usefixtures("recipe")
def test_digest_depends_on_the_python(script: ModuleType) -> None:
    tags = ("3.11 linux-x86_64", "3.12 linux-x86_64", "3.11 linux-aarch64")
    assert len({script.digest("small", tag) for tag in tags}) == 3


# --- Progress and interruption ------------------------------------------------------------------


def test_environment_whose_python_is_gone_is_made_again(
    script: ModuleType, recipe: Path, tmp_path: Path
) -> None:
    assert recipe.is_dir()
    cache = tmp_path / "cache"
    python = script.interpreter("small", sys.executable, cache)
    python.unlink()
    python.symlink_to(tmp_path / "gone")
    assert script.interpreter("small", sys.executable, cache) == python
    assert os.access(python, os.X_OK)


def test_a_stopped_build_leaves_nothing_and_ends_what_it_started(
    script: ModuleType, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.is_dir()
    started: list[int] = []
    run = script._run

    def stopped(command: Sequence[str], progress: Any, **options: Any) -> None:
        if "venv" in command:
            return run(command, progress, **options)
        sleeping = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"

        def stop(line: str) -> None:
            started.append(int(line))
            raise KeyboardInterrupt

        return run([sys.executable, "-c", sleeping], progress, watch=stop)

    monkeypatch.setattr(script, "_run", stopped)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        script.interpreter("small", sys.executable, cache)
    assert environments(cache) == []
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_progress_names_stage_packages_and_time(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = tmp_path / "pip"
    pip.write_text(
        "#!/bin/sh\necho 'Collecting a==1'\necho '  Downloading a-1.whl (2.5 GB)'\n"
        "echo 'Collecting B_c==2 (from -r x)'\necho 'Requirement already satisfied: d==1'\n"
        "echo 'Processing /w/torch-2.0%2Bcpu-cp311.whl'\necho 'Processing ./b_c-2-py3.whl'\n"
        "echo 'Collecting a==1'\necho 'Installing collected packages: a, B_c'\n"
    )
    pip.chmod(0o755)
    progress = script.Progress("small-cpu")
    progress._shown_at = -1e9
    script._pip([str(pip)], progress, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "small-cpu: packages (0:00)"
    assert lines[-1] == "small-cpu: packages: unpacking 4 of 7 (0:00)"
    progress._shown_at = -1e9
    progress.detail("packages 1 of 7: Downloading a-1.whl (2.5 GB)")
    assert "Downloading a-1.whl (2.5 GB)" in capsys.readouterr().err
    progress.detail("too soon after")
    assert capsys.readouterr().err == ""


def test_a_failed_command_shows_the_end_of_its_output(script: ModuleType) -> None:
    command = ["sh", "-c", "for i in $(seq 99); do echo line $i; done; echo why >&2; exit 3"]
    with pytest.raises(script.BuildError, match=r"(?s)status 3: sh .*line 99\nwhy") as caught:
        script._run(command, script.Progress("small-cpu"))
    assert "line 50\n" not in str(caught.value)
