"""The teacher in SGLang servers, reached over HTTP.

`wire` alone knows the format of requests and replies, `server` the options. SGLang itself is never
imported: it runs in its own interpreter.
"""
