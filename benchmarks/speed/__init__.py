"""Tokens per second, seconds and memory, of the engines, the loops and the replay buffer."""
