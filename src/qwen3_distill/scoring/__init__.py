"""Scoring: a frozen teacher gives the log-probabilities of tokens that the student sampled.

A `TeacherView` turns a rollout into a scoring job and the result into a scored rollout; a
`TeacherScorer` answers jobs: `embedded/` on PyTorch, `sglang/` and `vllm/` over HTTP (`served/` has
what they share), `CachedTeacher` from disk first. Nothing here trains, and no missing score is
replaced by a number.
"""
