"""The teacher in SGLang servers, reached over HTTP.

`SglangTeacher` scores jobs and `SglangSampler` answers prompts, both through `SglangEndpoint`: it
starts, checks and restarts the server. `wire` alone knows the format of requests and replies.
SGLang itself is never imported: it runs in its own interpreter.
"""
