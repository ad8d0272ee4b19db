"""Trains the student: batches, objectives, and the learners behind the port `Learner`.

`learner.TorchLearner` takes the step for both engines; `batching` turns records into tensors, the
one place that shifts and pads; `hosted.HostedLearner` runs any learner on a host. It never samples,
never scores, and knows nothing of the pipeline.
"""
