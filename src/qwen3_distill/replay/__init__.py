"""Keeps scored rollouts on the learner's device, so that several steps can train on them.

`buffer.ReplayBuffer` stores and draws them, `priority` has the laws of drawing, `flat` the tensors
that the buffer and the batches share. Nothing here runs a model or computes a loss.
"""
