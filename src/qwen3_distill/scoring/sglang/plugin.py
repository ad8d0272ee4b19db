"""Writes a plugin with which the processes of an SGLang server collect garbage rarely.

It has SGLang's interface for plugins, and servers that are started here get it.

The candidates of a pass are tens of thousands of Python lists. With Python's usual thresholds its
garbage collection reads them again and again: half of the time in which they are made, while
the GPU waits (benchmarks/results/topk_profile.json). SGLang's ``--gc-threshold`` reaches the
process that answers requests, not the scheduler, which makes the lists; plugins reach both.
"""

from pathlib import Path

THRESHOLDS = (50_000, 20, 100)
"""Objects made before the youngest generation is collected, and collections of one generation
before the next is."""
NAME = "qwen3_distill_collects_rarely"
"""The name of the plugin and of its module."""
_MODULE = f"""\
import gc
import multiprocessing


def collect_rarely():
    gc.set_threshold{THRESHOLDS}
    process = multiprocessing.current_process().name
    # Not through logging: SGLang sets that up later.
    print("garbage collection: thresholds", gc.get_threshold(), "in", process, flush=True)
"""
_ENTRY_POINTS = f"[sglang.srt.plugins]\n{NAME} = {NAME}:collect_rarely\n"
_METADATA = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n"


def write_plugin(folder: Path) -> Path:
    """Write the plugin into a folder, which a server is to have on its ``PYTHONPATH``."""
    about = folder / f"{NAME}-1.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.py").write_text(_MODULE, encoding="utf-8")
    (about / "entry_points.txt").write_text(_ENTRY_POINTS, encoding="utf-8")
    (about / "METADATA").write_text(_METADATA, encoding="utf-8")
    return folder
