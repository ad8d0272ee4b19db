"""Applies chat templates, which come with models and may do anything that a template can.

A template is rendered for the first time in a process of its own, with limits on time and memory;
after that in this process, with a limit on time.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jinja2 import TemplateError

from qwen3_distill.data import template_probe
from qwen3_distill.utils.shown import shortened

Result = TypeVar("Result")

PROBE_S = 30.0
"""Limit of the first rendering, the process's start included."""
RENDER_S = 30.0
"""Limit of every other rendering. Usual ones take a millisecond."""


class TemplateFault(TemplateError):
    """A template failed in a way that is no error of a template: time, memory, a division."""


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], **arguments: Any) -> Any:
    """Call the tokenizer's ``apply_chat_template`` within limits.

    Raises:
        TemplateError: the template refuses the messages; a `TemplateFault` if it fails otherwise,
            or takes too long.
        TypeError: the template does not take one of ``arguments``.
        ValueError: as TypeError.
    """
    template = arguments.get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    plain = {name: value for name, value in arguments.items() if _is_plain(value)}
    if isinstance(template, str):
        probe_once(template, {**plain, "messages": list(messages)})
    return within_limits(lambda: tokenizer.apply_chat_template(list(messages), **arguments))


def within_limits(render: Callable[[], Result]) -> Result:
    """Render a template that was probed, within the limit on time.

    Raises:
        TemplateError: the template refuses its values; a `TemplateFault` if it fails otherwise, or
            takes too long.
        TypeError: the template does not take one of its values.
        ValueError: as TypeError.
    """
    try:
        with _time_limit(RENDER_S):
            return render()
    except (TemplateError, TypeError, ValueError):
        raise
    except _TooLong:
        raise TemplateFault(f"it is not done after {RENDER_S:g} s") from None
    except Exception as error:  # a template computes: divisions, recursion, lookups
        reason = shortened(" ".join(str(error).split()), 200)
        raise TemplateFault(f"{type(error).__name__}: {reason}") from error


class _TooLong(BaseException):
    """Raised inside of a rendering whose time is over; no handler on its way may take it."""


class _Watchdog:
    """Interrupts threads that are past their deadline, by an exception raised inside of them."""

    _INTERVAL_S = 0.25

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        ident = threading.get_ident()
        with self._lock:
            self._deadlines[ident] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # not alive after a fork
                self._thread = threading.Thread(
                    target=self._watch, name="template watchdog", daemon=True
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                if self._deadlines.pop(ident, None) is None:  # it was raised, perhaps not yet here
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)

    def _watch(self) -> None:
        idle = 0
        while idle < 40:  # ends after ten seconds without a rendering
            time.sleep(self._INTERVAL_S)
            with self._lock:
                now = time.monotonic()
                late = [ident for ident, at in self._deadlines.items() if now > at]
                for ident in late:
                    del self._deadlines[ident]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(ident), ctypes.py_object(_TooLong)
                    )
                idle = 0 if self._deadlines else idle + 1
                if idle == 40:
                    self._thread = None


_time_limit = _Watchdog().limit
_probed: set[str] = set()


def probe_once(template: str, values: Mapping[str, Any]) -> None:
    """Render in another process, unless this process has done so with the same template.

    Args:
        values: what the template reads; those that JSON has no form for go as their text.

    Raises:
        TemplateFault: it took too long, or too much memory.
    """
    if template in _probed:
        return
    request = json.dumps({"template": template, "values": values}, default=str)
    try:
        done = subprocess.run(
            [sys.executable, "-c", template_probe.CODE],
            input=request.encode(),
            capture_output=True,
            timeout=PROBE_S,
        )
    except subprocess.TimeoutExpired:
        raise TemplateFault(f"it is not done after {PROBE_S:g} s") from None
    if done.returncode == template_probe.NO_MEMORY or done.returncode < 0:
        raise TemplateFault(f"it takes more than {template_probe.MEMORY_GIB} GiB")
    _probed.add(template)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
