"""The rollout engine of vLLM.

`engine.vllm_engine` makes it for the controller, which never imports vLLM. `worker` runs vLLM,
`extension` loads weights inside vLLM's own process and compares them, and `compat` is the only
module that uses what vLLM does not promise to keep.
"""
