"""Seeds derived from the purpose of a draw, so that none depends on how many came before it."""

import hashlib

MAX_SEED = 2**63 - 1


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) for one purpose, e.g. ``derive_seed(0, "rollout", step, index)``."""
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & MAX_SEED
