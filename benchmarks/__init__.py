"""Measurements of this project; each file is run from the repository's root.

    python -m benchmarks.speed.stages --help

`speed`, `learning` and `robustness` hold the benchmarks, `lib` their shared parts, `results` one
JSON file per measurement with its command, commit and machine. The package never imports from here.
"""
