"""The learner of unsloth, always in a host.

`learner.unsloth_learner` makes it for the controller, which never imports unsloth. `worker` runs
it, `student` loads the model that unsloth has patched, and `packing_probe` finds out whether packed
sequences see one another.
"""
