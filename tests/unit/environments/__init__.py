"""Tests of `qwen3_distill.environments` and of the commands on them."""
