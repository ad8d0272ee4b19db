"""The teacher in SGLang servers: one that is started here, or several that run elsewhere."""

from pathlib import Path

from qwen3_distill.config import SglangScoring
from qwen3_distill.modeling.loading import load_identity
from qwen3_distill.scoring.served.key import read_api_key
from qwen3_distill.scoring.served.teacher import ServedTeacher
from qwen3_distill.scoring.sglang.server import MemoryFraction, SglangServer
from qwen3_distill.scoring.sglang.wire import SGLANG
from qwen3_distill.types import SampledRequest, ScoreRequest


class SglangTeacher(ServedTeacher):
    """A `TeacherScorer` over SGLang's ``/generate``.

    Args:
        request: what the objective needs.
        memory_fraction: of a server started here; see `MemoryFraction`.
        max_total_tokens: of a server started here; None: SGLang's default.
        log: file that takes the output of a server started here.

    Raises:
        ConfigError: no server can answer the request, or the key cannot be read.
    """

    def __init__(
        self,
        config: SglangScoring,
        *,
        request: ScoreRequest,
        memory_fraction: MemoryFraction,
        max_total_tokens: int | None,
        log: Path,
    ) -> None:
        if config.api_key_file is not None:
            read_api_key(config.api_key_file)  # a bad one is said before anything is loaded
        identity = load_identity(config.model)
        server: SglangServer | None = None
        if not config.urls:
            server = SglangServer(
                config,
                context_length=identity.context_length,
                memory_fraction=memory_fraction,
                max_total_tokens=max_total_tokens,
                log=log,
            )
        super().__init__(
            config,
            SGLANG,
            identity=identity,
            request=request,
            server=server,
            probe=SampledRequest(),
        )
