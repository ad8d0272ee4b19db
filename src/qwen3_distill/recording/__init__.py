"""What a run writes about itself while it runs.

`jsonl` appends to ``metrics.jsonl`` and the like, `clock` and `trace` measure the stages, `trackers`
sends metrics to TensorBoard and others, `console` shows progress. Nothing here decides how a run
proceeds, and nothing reads a run folder for people: that is `report`.
"""
