"""Measures what distillation costs to equal accuracy; the plan is docs/evidence/protocol.md.

In this order: `make_models`, `run --trials`, `run`, `analyse`, `page`.
"""
