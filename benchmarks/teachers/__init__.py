"""Measures teachers that see something else than the student's tokens."""
