"""The common part of teachers in servers, whichever engine serves.

`ServedTeacher` scores jobs and `ServedSampler` answers prompts, both through `ServedEndpoint`: it
starts, checks and restarts the server. What an engine is asked, and how its replies are read, is
its `Wire`; how it is started, its `EngineServer`. `sglang/` and `vllm/` have one of each.
"""
