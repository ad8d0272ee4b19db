"""Records a run while it runs.

`jsonl` writes ``metrics.jsonl`` and the like, `clock` and `trace` measure the stages, `trackers`
sends metrics to TensorBoard and others, `console` shows progress. Nothing here decides how a run
proceeds; pictures and pages are made afterwards, by `report`.
"""
