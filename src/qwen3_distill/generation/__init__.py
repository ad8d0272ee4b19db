"""Sampling rollouts from the student.

`hosted.HostedRolloutEngine` is any engine whose worker runs in a host; `embedded` and `vllm` are
the engines. `partial_rollout` is the record of a rollout that is still being sampled. Nothing here
knows teachers, losses or optimizer steps.
"""
