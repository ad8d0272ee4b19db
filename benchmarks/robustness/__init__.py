"""Runs under faults, and the real engines against the embedded ones on a GPU machine."""
