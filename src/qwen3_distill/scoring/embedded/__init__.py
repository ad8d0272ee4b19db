"""The teacher on PyTorch, in this process or in a worker of its own.

`EmbeddedTeacher` scores; it imports no other teacher and keeps no logits of a whole sequence.
"""
