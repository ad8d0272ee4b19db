"""The one way to a terminal: text of others is escaped there, and no secret is shown."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qwen3_distill.utils.printable import printable
from qwen3_distill.utils.secrets import without_secrets


def for_terminal(text: str) -> str:
    """Return a text as a terminal or a log may show it.

    A server's reply, a template's error and a file's key may hold escape sequences, which move the
    cursor, change the title or hide what stands there.
    """
    return printable(without_secrets(text))


class TerminalConsole(Console):
    """A rich console whose text has no control characters but its own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
