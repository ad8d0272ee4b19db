"""Prints findings for people: a line each, with what to change below it."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen3_distill.doctor.diagnosis import Diagnosis
from qwen3_distill.pipeline.finding import Status
from qwen3_distill.recording.text import duration

_STYLES = {
    Status.PASS: "green",
    Status.WARN: "yellow",
    Status.FAIL: "bold red",
    Status.SKIP: "dim",
}


def print_table(diagnosis: Diagnosis, console: Console) -> None:
    """Print all findings and how many there are of each status."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "check", "found, and what to change"):
        table.add_column(title, overflow="fold", no_wrap=title != "found, and what to change")
    for finding in diagnosis.findings:
        text = Text(finding.verdict.found)
        if finding.verdict.change:
            text.append(f"\n-> {finding.verdict.change}", style="bold")
        status = Text(finding.status.value, style=_STYLES[finding.status])
        table.add_row(status, Text(finding.name), text)
    console.print(table)
    console.print(Text(summary(diagnosis)))


def summary(diagnosis: Diagnosis) -> str:
    """Return the last line: how many checks, and how they ended."""
    counts = diagnosis.record()
    return (
        f"{counts['checks']} checks in {duration(diagnosis.seconds)}: {counts['failed']} failed, "
        f"{counts['warned']} warned; {counts['skipped']} do not apply"
    )
