"""Qwen3 model directories: their shape, memory, identity, weights, digest and output head.

`loading` checks and loads a directory, `shapes` and `step_memory` predict sizes without torch,
`head` applies the output head in chunks, `known_answer` computes logprobs that a teacher must
reproduce. Nothing here samples, scores or trains.
"""
