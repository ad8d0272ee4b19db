"""Holds the settings of memory and speed that a config may begin with, largest first.

The first rung of each ladder is the largest that was measured or has a reason; every further rung
lowers one or a few settings, the cheapest first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from qwen3_distill.planning.machines import MachineKind


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Settings that trade memory for speed, and change no result."""

    max_sequences: int
    """``generation.max_sequences``."""
    micro_batch_tokens: int
    """``training.micro_batch_tokens``."""
    chunk_tokens: int
    """``scoring.chunk_tokens``."""
    chunked_prefill_tokens: int
    """``scoring.chunked_prefill_tokens``; of no use to an embedded teacher."""
    request_tokens: int
    """``scoring.request_tokens``; ``scoring.batch_tokens`` of an embedded teacher."""
    max_in_flight: int
    """``scoring.max_in_flight``."""

    def lowered_from(self, other: "Rung") -> list[str]:
        """List settings that are lower than those of ``other``: ``max_sequences 256 -> 128``."""
        return [
            f"{field.name} {before} -> {now}"
            for field in fields(self)
            if (now := getattr(self, field.name)) != (before := getattr(other, field.name))
        ]


def ladder(kind: MachineKind, *, streaming: bool) -> Iterator[Rung]:
    """Iterate over the rungs of a machine, largest first."""
    if kind == "cpu":
        yield from _embedded()
        return
    rung = Rung(
        max_sequences=256,  # docs/measured/h200-stages.md
        micro_batch_tokens=10240,
        chunk_tokens=8192,
        chunked_prefill_tokens=8192,
        request_tokens=16384,
        max_in_flight=4,
    )
    if kind == "unified":
        # A machine without memory to spare hangs: nothing is taken that gains little.
        rung = _unified_first()
    if streaming:
        # Decoding is full over several steps; docs/measured/overlap.md.
        rung = replace(
            rung,
            max_sequences=2 * rung.max_sequences,
            micro_batch_tokens=min(rung.micro_batch_tokens, 8192),
            chunk_tokens=min(rung.chunk_tokens, 2048),
        )
    yield rung
    for changes in _LOWERING:
        lower = replace(rung, **{k: min(v, getattr(rung, k)) for k, v in changes.items()})
        if lower != rung:
            rung = lower
            yield rung


_LOWERING: tuple[dict[str, int], ...] = (
    {"chunk_tokens": 2048},
    {"micro_batch_tokens": 8192},
    {"micro_batch_tokens": 5120},
    {"max_sequences": 256},
    {"max_sequences": 128},
    {"chunk_tokens": 1024, "chunked_prefill_tokens": 4096},
    {"request_tokens": 8192, "max_in_flight": 2},
    {"micro_batch_tokens": 4096},
    {"max_sequences": 64},
    {"micro_batch_tokens": 2048, "max_sequences": 32},
    {"chunk_tokens": 512, "chunked_prefill_tokens": 2048, "request_tokens": 4096},
    {"micro_batch_tokens": 1024, "max_sequences": 16},
    {"max_sequences": 4, "chunked_prefill_tokens": 1024, "request_tokens": 2048},
)


def _unified_first() -> Rung:
    return Rung(
        max_sequences=128,  # decodes half as fast again as 64: docs/measured/time-plan.md
        micro_batch_tokens=2048,  # as fast as larger ones there, and leaves room for the cache
        chunk_tokens=2048,
        chunked_prefill_tokens=4096,
        request_tokens=8192,
        max_in_flight=2,
    )


def _embedded() -> Iterator[Rung]:
    """Rungs of the embedded engines on a CPU; their first is that of configs/default.yaml."""
    for sequences, tokens in ((256, 16384), (64, 8192), (16, 4096), (4, 2048), (1, 1024)):
        yield Rung(
            max_sequences=sequences,
            micro_batch_tokens=tokens // 2,
            chunk_tokens=1024,
            chunked_prefill_tokens=tokens,
            request_tokens=tokens,
            max_in_flight=1,
        )
