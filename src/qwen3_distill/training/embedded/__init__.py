"""The learner on plain PyTorch and peft.

`student.build_embedded_learner` makes it in this process, `hosted.hosted_embedded_learner` in a
host, whose worker is `worker`.
"""
