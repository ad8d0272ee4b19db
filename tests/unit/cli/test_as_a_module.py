"""Scripts that were written when `cli` was a module run commands through it."""

import subprocess
import sys


def test_a_command_is_run_through_the_package() -> None:
    script = "from qwen3_distill import cli; cli.main(['--version'])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()
