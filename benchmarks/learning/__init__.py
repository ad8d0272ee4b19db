"""Accuracy after training: seeds, controls, staleness, replay, prefixes and gradient estimators."""
