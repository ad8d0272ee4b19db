"""Measures held-out accuracy; `accuracy.evaluate` samples and checks, `evaluator.Evaluator`
schedules it.

Knows samplers, problems and checkers as arguments; never builds an engine.
"""
