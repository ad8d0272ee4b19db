"""Benchmarks of the teacher's side: several teachers, other contexts, other tokenizers."""
