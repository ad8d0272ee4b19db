"""Tiny real models for the whole suite: Qwen3 with two layers and a byte tokenizer."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import engines, session_folder
from tests.tiny_models import TinyModels, write_tiny_models

# Tiny models gain nothing from a second thread, and lose much where the cores are shared.
torch.set_num_threads(1)

# How long an example takes is the machine's affair.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, not skip, where there is no CUDA device"
    )
    parser.addoption(
        "--cluster", action="store_true", help="run, not skip, the tests that start Ray"
    )
    engines.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    engines.read_options(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    engines.skip_what_is_not_installed(items)
    if not config.getoption("--cluster"):
        for item in items:
            if item.get_closest_marker("cluster"):
                item.add_marker(pytest.mark.skip(reason="starts Ray: make test-cluster"))
    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        session_folder.keep(session_folder.FOLDER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(
            f"files of failed tests, until the next session: {session_folder.FOLDER}"
        )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A student and a teacher directory with random weights and one tokenizer."""
    return write_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
