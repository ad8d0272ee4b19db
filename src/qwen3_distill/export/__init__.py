"""Exports of a finished run: the student as a model directory, a GGUF file or a LoRA adapter.

`export.export_run` is the entry point; `cli/export.py` is its command. Every export has a model
card and a record of its own files. The room reads run folders and writes elsewhere: it never
changes a run folder, and knows neither the pipeline nor an engine.
"""
