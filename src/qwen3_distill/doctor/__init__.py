"""Examines engines outside of a run; `precision.audit_teacher` is the entry point.

Never trains, and writes no run folder.
"""
