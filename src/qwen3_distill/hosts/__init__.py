"""Where engines run: processes that are started, called, watched and started again.

`host.Host` is the port; `process.LocalProcess` runs a worker on this machine, and `serve` is the
worker's side. `supervision.Restarts` is the only restart machine. `child` runs one command with all
it starts; `mps` runs the daemon that lets processes share a GPU. Nothing here knows what an engine
computes.
"""
