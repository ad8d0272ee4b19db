"""A small server that answers ``/generate`` as SGLang does, for machines that have no SGLang.

Hugging Face's own model behind the JSON of SGLang 0.5.16 and 0.5.21: the first logprob is null, the
vocabulary's last id is echoed as 0, NaN is null, too long is status 400. It is healthy; what a
healthy server never says is `tests.fault_proxy`'s part.

As a process it takes the place of the interpreter that has SGLang (`write_interpreter`), and reads
the configuration file that ``sglang.launch_server`` would.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]


class StandIn:
    """The answers of one model."""

    def __init__(self, model_dir: str | Path, *, api_key: str | None = None) -> None:
        torch.set_num_threads(1)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._context_length = self._model.config.max_position_embeddings
        self._api_key = api_key
        self._lock = threading.Lock()

    def answer(self, headers: Any, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a reply."""
        if self._api_key and headers.get("Authorization") != f"Bearer {self._api_key}":
            return 401, {"error": "Unauthorized"}
        request = json.loads(body)
        if any(len(ids) > self._context_length for ids in request["input_ids"]):
            return 400, {"error": {"message": "The input is longer than the context length."}}
        with self._lock, torch.inference_mode():
            return 200, [self._entry(request, index) for index in range(len(request["input_ids"]))]

    def _entry(self, request: dict[str, Any], index: int) -> dict[str, Any]:
        ids = request["input_ids"][index]
        sampling = request["sampling_params"]
        sampling = sampling[index] if isinstance(sampling, list) else sampling
        if sampling["max_new_tokens"] > 0:
            return self._sampled(request, ids, sampling)
        start = request["logprob_start_len"][index]
        logprobs_TV = self._logits(ids).log_softmax(-1)[start:-1]
        target_T1 = torch.tensor(ids[start + 1 :]).unsqueeze(-1)
        values = [None, *logprobs_TV.gather(-1, target_T1).squeeze(-1).tolist()]
        last = logprobs_TV.shape[-1] - 1
        echoed = [token if token < last else 0 for token in ids[start:]]
        meta: dict[str, Any] = {
            "input_token_logprobs": [
                [value, token, None] for value, token in zip(values, echoed, strict=True)
            ],
            "finish_reason": {"type": "length", "length": 0},
        }
        if request.get("top_logprobs_num"):
            top = logprobs_TV.topk(request["top_logprobs_num"])
            meta["input_top_logprobs"] = [
                None,
                *(
                    [[value, token, None] for value, token in zip(*row, strict=True)]
                    for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ),
            ]
        return {"output_ids": [], "meta_info": meta}

    def _sampled(
        self, request: dict[str, Any], ids: list[int], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(sampling["sampling_seed"])
        new: list[int] = []
        plain: list[float] = []
        truncated: list[float] = []
        while len(new) < sampling["max_new_tokens"]:
            logprobs_V = (self._logits([*ids, *new])[-1] / sampling["temperature"]).log_softmax(-1)
            kept_V = _truncated(logprobs_V, sampling)
            token = int(torch.multinomial(kept_V.exp(), 1, generator=generator))
            new.append(token)
            plain.append(float(logprobs_V[token]))
            truncated.append(float(kept_V[token]))
            if token in sampling["stop_token_ids"]:
                break
        meta: dict[str, Any] = {
            "output_token_logprobs": [[v, t, None] for v, t in zip(plain, new, strict=True)],
            "finish_reason": {"type": "stop"},
        }
        if request.get("return_sampling_mask"):
            meta["output_token_sampling_logprobs"] = truncated
        return {"output_ids": new, "meta_info": meta}

    def _logits(self, ids: list[int]) -> Tensor:
        return self._model(torch.tensor([ids])).logits[0]


def _truncated(logprobs_V: Tensor, sampling: dict[str, Any]) -> Tensor:
    """What is left of a distribution after top-k and top-p, both of the whole distribution."""
    values, order = logprobs_V.sort(descending=True)
    place = torch.arange(values.numel())
    keep = values.exp().cumsum(0) - values.exp() <= sampling["top_p"]
    if sampling["top_k"] > 0:
        keep &= place < sampling["top_k"]
    kept_V = torch.full_like(logprobs_V, -torch.inf)
    kept_V[order[keep]] = values[keep]
    return kept_V.log_softmax(-1)


class StandInServer:
    """A stand-in on a port, in threads of this process."""

    def __init__(self, stand_in: StandIn, port: int = 0) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(stand_in))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def serve(self) -> None:
        self._http.serve_forever(poll_interval=0.05)

    def start(self) -> "StandInServer":
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, reply = stand_in.answer(self.headers, body)
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            return None

    return Handler


def write_interpreter(path: Path, prelude: str = "") -> str:
    """An executable that is started like the interpreter with SGLang, and starts a stand-in.

    Args:
        prelude: shell commands to run first; ``exit 1`` makes a server that dies at its start.
    """
    path.write_text(
        f'#!/bin/sh\n{prelude}\ncd {ROOT}\nexec {sys.executable} -m tests.sglang_stand_in "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def main() -> None:
    config_file = Path(sys.argv[sys.argv.index("--config") + 1])
    settings = yaml.safe_load(config_file.read_text())
    stand_in = StandIn(settings["model-path"], api_key=settings["api-key"])
    print("The server is fired up and ready to roll!", flush=True)  # noqa: T201
    StandInServer(stand_in, settings["port"]).serve()


if __name__ == "__main__":
    main()
