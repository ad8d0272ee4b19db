"""Measures teachers: several, with a context of their own, or with another tokenizer."""
