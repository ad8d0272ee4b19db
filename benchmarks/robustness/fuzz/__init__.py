"""Odd inputs in great numbers: each is refused with a cause, or read as exactly what it says."""
