"""Counts what the forward and backward passes of a step computed, for the cost ledger."""

from qwen3_distill.training.batching import MicroBatch, triangle
from qwen3_distill.types import Metric


class PassCounts:
    """Tokens and attention pairs of a step's micro-batches, padding apart.

    Args:
        chunk_tokens: rows of logits that are held at a time; of a micro-batch with more loss
            tokens, logits are computed twice.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._tokens = self._pairs = 0
        self._padded_tokens = self._padded_pairs = 0
        self._loss_tokens = self._recomputed = 0

    def add(self, micro: MicroBatch) -> None:
        rows, width = micro.input_BT.shape
        self._tokens += sum(micro.sequence_tokens)
        self._pairs += micro.attention_pairs
        is_packed = rows < len(micro.sequence_tokens)  # several sequences in a row: no padding
        self._padded_tokens += rows * width
        self._padded_pairs += micro.attention_pairs if is_packed else rows * triangle(width)
        loss_tokens = sum(micro.loss_tokens)
        self._loss_tokens += loss_tokens
        self._recomputed += loss_tokens if loss_tokens > self._chunk_tokens else 0

    def metrics(self) -> list[Metric]:
        """Return the counts of the step under the names that the cost ledger reads."""
        return [
            Metric.sum("train/input_tokens", self._tokens),
            Metric.sum("train/padding_tokens", self._padded_tokens - self._tokens),
            Metric.sum("train/attention_pairs", self._pairs),
            Metric.sum("train/padding_pairs", self._padded_pairs - self._pairs),
            Metric.sum("train/head_tokens", self._loss_tokens),
            Metric.sum("train/recomputed_head_tokens", self._recomputed),
        ]
