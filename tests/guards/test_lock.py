"""requirements.lock has what pyproject.toml asks for, and is installed only where it was made."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def pins(text: str) -> dict[str, str]:
    """Read name and version of each line; a line that is not an exact pin is an error."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"{line!r} is not an exact pin"
            found[canonicalize_name(name)] = version
    return found


def requirements(pyproject: str, key: str) -> list[Requirement]:
    """Read a list of requirements of a pyproject.toml."""
    (block,) = re.findall(rf"^{key} = \[\n(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    return [Requirement(text) for text in re.findall(r'^ +"([^"]+)"', block, re.MULTILINE)]


def unmet(wanted: list[Requirement], locked: dict[str, str]) -> list[str]:
    """Name the requirements that the lock lacks or has in another version."""
    return [
        str(requirement)
        for requirement in wanted
        if not requirement.specifier.contains(
            locked.get(canonicalize_name(requirement.name), "0.dev0"), prereleases=False
        )
    ]


@pytest.mark.parametrize("key", ["dependencies", "dev"])
def test_lock_has_what_the_project_asks_for(key: str) -> None:
    wanted = requirements(PYPROJECT, key)
    assert len(wanted) > 5
    assert unmet(wanted, pins(LOCK.read_text(encoding="utf-8"))) == []


def test_guard_sees_what_is_missing_and_what_is_too_new() -> None:
    pyproject = 'dependencies = [\n    "a>=1,<2",\n    "b_c[x]>=1", # why\n    "d>=1",\n]\n'
    wanted = requirements(pyproject, "dependencies")
    assert unmet(wanted, pins("# for\na==1.5\nB-c==1+cpu\nd==1\n")) == []
    assert unmet(wanted, pins("a==2.0\nd==1\n")) == ["a<2,>=1", "b_c[x]>=1"]
    with pytest.raises(AssertionError, match="'a>=1' is not an exact pin"):
        pins("a>=1\n")


# --- Installing it --------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = ROOT / "scripts" / "install_lock.py"
    spec = importlib.util.spec_from_file_location("install_lock", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The locks that the script would have installed."""
    locks: list[Path] = []
    monkeypatch.setattr(script, "install_lock", lambda lock, _: locks.append(lock))
    return locks


def test_workflow_has_the_python_of_the_lock(script: ModuleType) -> None:
    python, _, platform = script.made_for(LOCK).partition(" ")
    versions = re.findall(r'python-version: "(.*)"', WORKFLOW.read_text(encoding="utf-8"))
    assert set(versions) == {python}
    assert platform == "linux-x86_64"


def test_lock_is_installed_on_the_python_that_it_is_for(
    script: ModuleType, installed: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "a.lock"
    lock.write_text(f"# for: {script.python_tag(sys.executable)}\na==1\n")
    script.main(lock)
    assert installed == [lock]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tag", ["3.9 linux-x86_64", "3.11 plan9-vax"])
def test_lock_of_another_python_is_left_with_a_word(
    tag: str,
    script: ModuleType,
    installed: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock = tmp_path / "a.lock"
    lock.write_text(f"# for: {tag}\na==1\n")
    script.main(lock)
    assert installed == []
    said = capsys.readouterr().err
    assert f"{lock} is for Python {tag}, this is Python 3." in said
    assert "newest versions that pyproject.toml allows" in said


def test_lock_without_its_python_is_refused(script: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    lock.write_text("a==1\n")
    with pytest.raises(SystemExit, match=r"begins with 'a==1', expected '# for: '"):
        script.main(lock)


def test_lock_that_pip_cannot_install_is_an_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(lock: Path, python: Path) -> None:
        raise script.BuildError("failed with status 1: pip install")

    monkeypatch.setattr(script, "install_lock", fail)
    lock = tmp_path / "a.lock"
    lock.write_text(f"# for: {script.python_tag(sys.executable)}\n")
    with pytest.raises(SystemExit, match="error: failed with status 1"):
        script.main(lock)
