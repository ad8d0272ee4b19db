"""Where engines run: processes that are started, called, watched and started again.

`host.Host` is the port; `process.LocalProcess` runs a worker on this machine, and `serve` is the
worker's side. `supervision.Restarts` restarts engines that recover by themselves; a lost learner is
restarted by `pipeline/run.py`, from the last checkpoint. `child` runs one command with all it
starts; `mps` runs the daemon that lets processes share a GPU. Nothing here knows what an engine
computes.
"""
