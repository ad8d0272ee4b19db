"""Asks a user's function for verdicts or rewards, in a process of its own."""

import os
from collections.abc import Mapping
from typing import Any

from qwen3_distill.config import PythonVerifier
from qwen3_distill.data.sources import RawPrompt
from qwen3_distill.data.verifiers.line_process import LineProcess
from qwen3_distill.errors import DataError
from qwen3_distill.types import Prompt

_MAX_REMEMBERED = 4096
"""Number of rewards that are kept: a step asks for a rollout's twice (reward, metric)."""


class PythonFunctionVerifier:
    """Judges by a function of a Python file; errors name the row and are never a reward of 0.

    Thread-safe; calls take turns. The process is started by the first call, is used again, and is
    replaced after a call that took too long.
    """

    def __init__(self, config: PythonVerifier) -> None:
        self._function = config.function
        self._timeout_s = config.timeout_s
        self._file, _, name = config.function.rpartition(":")
        self._worker = LineProcess(
            "function_process.py",
            ["python", str(config.timeout_s), self._file, name],
            f"verifier.function={config.function} cannot be loaded: its process ended with status "
            "{status} (its error stands above), expected a file that loads within two minutes; "
            "correct the file",
        )
        self._rewards: dict[tuple[str, str], bool | float] = {}

    def start(self) -> None:
        """Load the file and check the function.

        Raises:
            DataError: it cannot be loaded, has no such function, or it takes other arguments.
        """
        if not os.path.isfile(self._file):
            raise DataError(
                f"verifier.function={self._function}: the file does not exist, expected "
                "path/to/file.py:name; correct the path"
            )
        problem = self._worker.start()
        if isinstance(problem, dict):
            raise DataError(
                f"verifier.function={self._function} cannot be used: {problem['error']}; correct "
                "the file or the name"
            )

    def check(self, prompt: Prompt | RawPrompt) -> None:
        self.start()

    def correct(self, prompt: Prompt, response_text: str) -> bool | float:
        key = (prompt.prompt_id, response_text)
        if key not in self._rewards:
            if len(self._rewards) >= _MAX_REMEMBERED:
                self._rewards.clear()
            self._rewards[key] = self._asked(prompt, response_text)
        return self._rewards[key]

    def _asked(self, prompt: Prompt, response_text: str) -> bool | float:
        self.start()
        answer = self._worker.ask({"row": row_of(prompt), "response": response_text})
        if answer is None:
            problem = f"took longer than timeout_s={self._timeout_s:g} s, or ended its process"
            change = "make it faster, or raise verifier.timeout_s"
        elif "error" in answer:
            problem, change = answer["error"], "correct the function"
        else:
            return answer["value"]
        raise DataError(
            f"prompt {prompt.prompt_id} (numbered from 0): verifier.function={self._function} "
            f"{problem}, expected True, False or a number from 0 to 1; {change}. The response: "
            f"{response_text[-200:]!r}"
        )


def row_of(prompt: Prompt) -> Mapping[str, Any]:
    """Return what the function gets to know about a prompt."""
    return {"prompt_id": prompt.prompt_id, **prompt.task_data}
