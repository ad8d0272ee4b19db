"""The parts of `make_lab_models.py`: tokenizer, models, examples, sampling and training.

Plain PyTorch and transformers on one CPU core. Nothing here is used by a run: the lab models are
plain model directories.
"""
