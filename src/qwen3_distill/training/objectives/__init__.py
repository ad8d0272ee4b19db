"""The losses. `build_objective` (in `build`) makes the one that a config names.

`base` has the protocol and helpers, `losses` the mathematics as functions of tensors; every other
file is one kind of objective. An objective sees one micro-batch at a time. It never moves data to a
device, steps the optimizer or asks which engines a run has.
"""
