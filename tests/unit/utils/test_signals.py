"""A command whose terminal is closed saves its work, though it can say nothing any more."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from qwen3_distill.utils.signals import signals_as_ctrl_c, stop_on_ctrl_c

asked = []

def ask():
    print("stopping", flush=True)
    asked.append(True)

with signals_as_ctrl_c(), stop_on_ctrl_c(ask):
    print("ready", flush=True)
    while not asked:
        time.sleep(0.01)
    print("saving", flush=True)
    Path(sys.argv[1]).write_text("work")
"""


def take_terminal() -> None:
    """Before the script begins: it is told when the terminal goes, under nohup too."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_work_is_saved_when_its_terminal_is_closed(tmp_path: Path) -> None:
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "saved")],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(end)
    try:
        assert b"ready" in os.read(terminal, 1000)
        os.close(terminal)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "saved").read_text() == "work"
