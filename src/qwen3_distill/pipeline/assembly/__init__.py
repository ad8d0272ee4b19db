"""Builds the parts of a run from its config; `engines.build_parts` is the entry point.

The only room that imports engines and asks which kind the config names. It starts nothing: the
parts' own `start` does.
"""
