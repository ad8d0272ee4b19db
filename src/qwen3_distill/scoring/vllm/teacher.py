"""The teacher in vLLM servers: one that is started here, or several that run elsewhere."""

from dataclasses import replace
from pathlib import Path

from qwen3_distill.config import VllmScoring
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.served.key import read_api_key
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.vllm.server import VllmServer
from qwen3_distill.scoring.vllm.wire import VLLM
from qwen3_distill.types import ScoreRequest, TopKRequest


class VllmTeacher(ServedTeacher):
    """A `TeacherScorer` over vLLM's ``/v1/completions``.

    Args:
        request: what the objective needs.
        kv_cache_bytes: of a server started here.
        log: file that takes the output of a server started here.

    Raises:
        ConfigError: no server can answer the request, or the key cannot be read.
    """

    def __init__(
        self, config: VllmScoring, *, request: ScoreRequest, kv_cache_bytes: int, log: Path
    ) -> None:
        if config.api_key_file is not None:
            read_api_key(config.api_key_file)  # a bad one is said before anything is loaded
        identity = load_identity(config.model)
        longest = min(config.max_model_tokens or identity.context_length, identity.context_length)
        identity = replace(identity, context_length=longest)
        server: VllmServer | None = None
        if not config.urls:
            server = VllmServer(
                config,
                max_tokens=longest,
                max_candidates=request.k if isinstance(request, TopKRequest) else 0,
                kv_cache_bytes=kv_cache_bytes,
                log=log,
            )
        super().__init__(
            config, VLLM, identity=identity, request=request, server=server, probe=request
        )
