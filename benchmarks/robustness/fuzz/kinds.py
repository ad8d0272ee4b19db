"""The kinds of odd inputs by name: the module that tries them, and how many by default.

A module has a function ``run(seed, count) -> Counts``. It is imported when its kind is asked for.
"""

import importlib

from benchmarks.robustness.fuzz.counts import Kind

KINDS: dict[str, tuple[str, int]] = {
    "configs": ("configs", 10_000),
    "replies": ("replies", 20_000),
    "vllm_replies": ("vllm_replies", 20_000),
    "files": ("files", 2_000),
    "prompt_files": ("prompt_files", 10_000),
    "http_replies": ("http_replies", 200),
    "model_dirs": ("model_dirs", 100),
}


def load_kind(name: str) -> Kind:
    """Return the function that tries a kind's inputs."""
    module, _ = KINDS[name]
    return importlib.import_module(f"benchmarks.robustness.fuzz.{module}").run
