"""The teacher in vLLM servers, reached over HTTP.

`wire` alone knows the format of requests and replies, `server` the options. vLLM itself is never
imported: it runs in its own interpreter.
"""
