"""Writes plugins with which the processes of an SGLang server find candidates faster.

They have SGLang's interface for plugins, and servers that are started here get them.

The candidates of a pass are tens of thousands of Python lists. With Python's usual thresholds its
garbage collection reads them again and again: half of the time in which they are made, while
the GPU waits. SGLang's ``--gc-threshold`` reaches the process that answers requests, not the
scheduler, which makes the lists; plugins reach both. And a selection by blocks takes less than half
of the time of one over the whole vocabulary (benchmarks/results/topk_profile.json).
"""

from pathlib import Path

from qwen3_distill.scoring.sglang import in_server

COLLECTION = in_server.collect_rarely.__name__
SELECTION = in_server.select_by_blocks.__name__
"""The plugins' functions."""
NAME = "qwen3_distill_in_server"
"""The name of the plugins' module and of their distribution."""
_METADATA = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n"


def write_plugins(folder: Path, *functions: str) -> Path:
    """Write these plugins into a folder, which a server is to have on its ``PYTHONPATH``."""
    about = folder / f"{NAME}-1.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    module = Path(in_server.__file__).read_text(encoding="utf-8")
    (folder / f"{NAME}.py").write_text(module, encoding="utf-8")
    entries = [f"qwen3_distill_{each} = {NAME}:{each}" for each in functions]
    text = "\n".join(["[sglang.srt.plugins]", *entries, ""])
    (about / "entry_points.txt").write_text(text, encoding="utf-8")
    (about / "METADATA").write_text(_METADATA, encoding="utf-8")
    return folder
