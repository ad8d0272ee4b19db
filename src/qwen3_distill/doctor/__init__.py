"""Examines a config and its engines outside of a run; `diagnosis.diagnose` is the entry point.

Keeps nothing that it trains, and writes no run folder.
"""
