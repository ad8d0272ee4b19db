"""Runs a distillation; `run.run` is the entry point, `offline` has the stages one by one.

`sequential` and `streaming` are the two loops, `step` is what they share, `flow` brings rollouts
to the streaming loop. `recorder` writes the run folder. Engines are used through the ports only;
`assembly` builds them.
"""
