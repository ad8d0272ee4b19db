"""Text of others on a terminal: escaped, whoever prints it and however."""

import io
from pathlib import Path

import pytest
from rich.table import Table

from qwen3_distill.cli.main import main
from qwen3_distill.cli.terminal import fail, print_json, say, warn
from qwen3_distill.recording.console import LiveReporter, PlainReporter
from qwen3_distill.recording.output import surviving_output
from qwen3_distill.recording.terminal import TerminalConsole
from qwen3_distill.utils.secrets import remember_secret

EVIL = "\x1b]0;title\x07 \x1b[2J \r \x9b31m \u202e \ud800 \x7f"
KEY = "sk-terminal-0123456789"
remember_secret(KEY)


def harmless(text: str) -> None:
    assert not set(text) & set("\x1b\x07\r\x9b\x7f\u202e\ud800"), text
    assert KEY not in text
    assert r"\x1b" in text or "u001b" in text


def test_what_commands_print_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL + KEY)
    warn(EVIL + KEY)
    with pytest.raises(SystemExit):
        fail(EVIL + KEY, 3)
    print_json({"a": EVIL})
    out, err = capsys.readouterr()
    harmless(out)
    harmless(err)
    assert err.count(r"\x1b]0;title") == 2


@pytest.mark.parametrize("live", [True, False])
def test_what_a_run_shows_is_escaped(live: bool) -> None:
    out = io.StringIO()
    console = TerminalConsole(file=out, force_terminal=False, width=200)
    with (LiveReporter if live else PlainReporter)(3, 0, console) as reporter:
        reporter.note(EVIL + KEY)
        reporter.stage(EVIL + KEY)
    harmless(out.getvalue())


def test_tables_and_wrapped_text_are_escaped() -> None:
    out = io.StringIO()
    table = Table(EVIL)
    table.add_row(EVIL * 10)
    TerminalConsole(file=out, force_terminal=False, width=40).print(table, EVIL * 10)
    harmless(out.getvalue())


def test_a_consoles_own_colours_stay() -> None:
    out = io.StringIO()
    TerminalConsole(file=out, force_terminal=True, color_system="standard").print("[red]x")
    assert "\x1b[31m" in out.getvalue()


def test_a_key_of_a_config_file_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('"\\e[2J\\a": 1\n')
    with pytest.raises(SystemExit):
        main(["config", "check", "-c", str(file)])
    err = capsys.readouterr().err
    assert r"\x1b[2J\x07" in err
    assert "\x1b" not in err


def test_a_terminal_of_another_encoding_shows_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with surviving_output():
        say("für 日本")
    assert raw.getvalue() == rb"f\xfcr \u65e5\u672c" + b"\n"
