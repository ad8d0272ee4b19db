"""Measurements of this project; each file is run from the repository's root.

    python -m benchmarks.speed.stages --help

`speed`, `learning` and `robustness` hold what is run, `lib` what they share, `results` one JSON file
per measurement with its command, commit and machine. The package never imports from here.
"""
