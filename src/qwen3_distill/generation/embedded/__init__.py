"""The rollout engine on plain PyTorch: continuous batching with a KV cache.

`engine.EmbeddedRolloutEngine` runs in this process; `hosted.hosted_embedded_engine` makes the same
engine in a host, whose worker is `worker`. It serves whole weights, never adapters.
"""
