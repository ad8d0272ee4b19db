"""A small server that answers ``/generate`` as SGLang does, for machines that have no SGLang.

A tiny Qwen3 in numpy behind the JSON of SGLang 0.5.16 and 0.5.21: the first logprob is null, the
vocabulary's last id is echoed as 0, a sequence that is too long gets status 400, candidates are
arrays if these are asked for. It starts fast, because it needs no torch. Its replies have no
faults; `tests.fault_proxy` makes those.

Shape letters: T tokens, D hidden size, H heads, K key-value heads, E head size, V vocabulary.

As a process it replaces the interpreter that has SGLang (`write_interpreter`), and reads the
configuration file of ``sglang.launch_server``.
"""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
Array = NDArray[np.floating[Any]]


class NumpyQwen3:
    """The forward pass of a small model."""

    def __init__(self, model_dir: Path) -> None:
        self.config = json.loads((model_dir / "config.json").read_text())
        self._weights = load_file(model_dir / "model.safetensors")

    def logits(self, ids: list[int]) -> Array:
        """[T, V]"""
        embeddings_VD = self._weights["model.embed_tokens.weight"]
        hidden_TD = embeddings_VD[ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            hidden_TD = hidden_TD + self._attention(
                self._norm(hidden_TD, prefix + "input_layernorm"), prefix + "self_attn."
            )
            hidden_TD = hidden_TD + self._mlp(
                self._norm(hidden_TD, prefix + "post_attention_layernorm"), prefix + "mlp."
            )
        head_VD = self._weights.get("lm_head.weight", embeddings_VD)
        return self._norm(hidden_TD, "model.norm") @ head_VD.T

    def _norm(self, values: Array, name: str) -> Array:
        mean = np.mean(values**2, axis=-1, keepdims=True)
        return (
            values / np.sqrt(mean + self.config["rms_norm_eps"]) * self._weights[name + ".weight"]
        )

    def _linear(self, values: Array, name: str) -> Array:
        return values @ self._weights[name + ".weight"].T

    def _mlp(self, hidden_TD: Array, prefix: str) -> Array:
        gate = self._linear(hidden_TD, prefix + "gate_proj")
        gated = gate / (1 + np.exp(-gate)) * self._linear(hidden_TD, prefix + "up_proj")
        return self._linear(gated, prefix + "down_proj")

    def _attention(self, hidden_TD: Array, prefix: str) -> Array:
        size, num_tokens = self.config["head_dim"], len(hidden_TD)
        query_THE = self._heads(hidden_TD, prefix, "q", size)
        key_TKE = self._heads(hidden_TD, prefix, "k", size)
        value_TKE = self._linear(hidden_TD, prefix + "v_proj").reshape(num_tokens, -1, size)
        repeats = query_THE.shape[1] // key_TKE.shape[1]
        key_THE, value_THE = (np.repeat(x, repeats, axis=1) for x in (key_TKE, value_TKE))
        scores_HTT = np.einsum("qhe,khe->hqk", query_THE, key_THE) / np.sqrt(size)
        scores_HTT = np.where(np.tri(num_tokens, dtype=bool), scores_HTT, -np.inf)
        weights_HTT = np.exp(log_softmax(scores_HTT))
        mixed_THE = np.einsum("hqk,khe->qhe", weights_HTT, value_THE)
        return self._linear(mixed_THE.reshape(num_tokens, -1), prefix + "o_proj")

    def _heads(self, hidden_TD: Array, prefix: str, which: str, size: int) -> Array:
        """Return queries or keys: projected, normalised and rotated by their position."""
        heads = self._linear(hidden_TD, f"{prefix}{which}_proj").reshape(len(hidden_TD), -1, size)
        heads = self._norm(heads, f"{prefix}{which}_norm")
        theta = self.config["rope_parameters"]["rope_theta"]
        speeds = theta ** -(np.arange(0, size, 2) / size)
        angles = np.tile(np.outer(np.arange(len(hidden_TD)), speeds), 2)[:, None]
        half = size // 2
        turned = np.concatenate([-heads[..., half:], heads[..., :half]], axis=-1)
        return (heads * np.cos(angles) + turned * np.sin(angles)).astype(np.float32)


def log_softmax(values: Array) -> Array:
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class StandIn:
    """Answers requests with one model."""

    def __init__(self, model_dir: str | Path, *, api_key: str | None = None) -> None:
        self._model = NumpyQwen3(Path(model_dir))
        self._api_key = api_key
        self._lock = threading.Lock()

    def answer(self, headers: Any, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON of a reply."""
        if self._api_key and headers.get("Authorization") != f"Bearer {self._api_key}":
            return 401, {"error": "Unauthorized"}
        request = json.loads(body)
        limit = self._model.config["max_position_embeddings"]
        if any(len(ids) > limit for ids in request["input_ids"]):
            return 400, {"error": {"message": "The input is longer than the context length."}}
        with self._lock:
            return 200, [self._entry(request, index) for index in range(len(request["input_ids"]))]

    def _entry(self, request: dict[str, Any], index: int) -> dict[str, Any]:
        ids = request["input_ids"][index]
        sampling = request["sampling_params"]
        sampling = sampling[index] if isinstance(sampling, list) else sampling
        if sampling["max_new_tokens"] > 0:
            return self._sampled(request, ids, sampling)
        start = request["logprob_start_len"][index]
        logprobs_TV = log_softmax(self._model.logits(ids))[start:-1]
        target_T1 = np.array(ids[start + 1 :])[:, None]
        values = [None, *np.take_along_axis(logprobs_TV, target_T1, 1)[:, 0].tolist()]
        last = logprobs_TV.shape[-1] - 1
        echoed = [token if token < last else 0 for token in ids[start:]]
        meta: dict[str, Any] = {
            "input_token_logprobs": [
                [value, token, None] for value, token in zip(values, echoed, strict=True)
            ],
            "finish_reason": {"type": "length", "length": 0},
        }
        if k := request.get("top_logprobs_num"):
            order_TK = np.argsort(-logprobs_TV, axis=1)[:, :k]
            rows = [
                [[float(row_V[token]), int(token), None] for token in order_K]
                for row_V, order_K in zip(logprobs_TV, order_TK, strict=True)
            ]
            if request.get("return_flat_raw_top_logprobs_b64"):
                meta |= candidates_as_arrays([None, *rows])
            else:
                meta["input_top_logprobs"] = [None, *rows]
        return {"output_ids": [], "meta_info": meta}

    def _sampled(
        self, request: dict[str, Any], ids: list[int], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        rng = np.random.default_rng(sampling["sampling_seed"])
        new: list[int] = []
        plain: list[float] = []
        truncated: list[float] = []
        while len(new) < sampling["max_new_tokens"]:
            logits_V = self._model.logits([*ids, *new])[-1].astype(np.float64)
            logprobs_V = log_softmax(logits_V / sampling["temperature"])
            kept_V = truncated_logprobs(logprobs_V, sampling)
            token = int(rng.choice(len(kept_V), p=np.exp(kept_V)))
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


def truncated_logprobs(logprobs_V: Array, sampling: dict[str, Any]) -> Array:
    """Return the distribution after top-k and top-p, both taken of the whole distribution."""
    order = np.argsort(-logprobs_V)
    probs = np.exp(logprobs_V[order])
    keep = np.cumsum(probs) - probs <= sampling["top_p"]
    if sampling["top_k"] > 0:
        keep &= np.arange(len(order)) < sampling["top_k"]
    kept_V = np.full_like(logprobs_V, -np.inf)
    kept_V[order[keep]] = logprobs_V[order[keep]]
    return log_softmax(kept_V)


class Answers(Protocol):
    """A stand-in of any engine."""

    def answer(self, headers: Any, body: bytes) -> tuple[int, Any]: ...


def candidates_as_arrays(rows: list[list[list[Any]] | None]) -> dict[str, Any]:
    """Return the members of an answer that hold rows of candidates in base64, as SGLang 0.5.21.

    Only the first rows may be empty, and the others must be of the same length.
    """
    empty = next((i for i, row in enumerate(rows) if row), len(rows))
    full = rows[empty:]
    found: dict[str, Any] = {
        "input_top_logprobs_shape": [len(full), len(full[0] or ()) if full else 0],
        "input_top_logprobs_null_prefix": empty,
    }
    for column, (name, dtype) in enumerate((("val", "float32"), ("idx", "int32"))):
        array = np.array([[item[column] for item in row or ()] for row in full], dtype=dtype)
        found[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        found[f"input_top_logprobs_{name}_flat_b64_dtype"] = dtype
    return found


def candidates_as_lists(meta: dict[str, Any]) -> list[list[list[Any]] | None]:
    """Return the rows of candidates of an answer that has them as arrays."""
    columns = [
        np.frombuffer(base64.b64decode(meta[f"input_top_logprobs_{name}_flat_b64"]), dtype)
        for name, dtype in (("val", "<f4"), ("idx", "<i4"))
    ]
    values, ids = (c.reshape(meta["input_top_logprobs_shape"]).tolist() for c in columns)
    rows: list[list[list[Any]] | None] = [None] * meta["input_top_logprobs_null_prefix"]
    for row in zip(values, ids, strict=True):
        rows.append([[value, token, None] for value, token in zip(*row, strict=True)])
    return rows


class StandInServer:
    """A stand-in on a port, in threads of this process."""

    def __init__(self, stand_in: Answers, port: int = 0) -> None:
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


def _handler(stand_in: Answers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/freeze_gc" and self.headers["Authorization"]:
                print("Freezing GC", flush=True)  # noqa: T201
                status, reply = 200, "frozen"
            else:
                status, reply = stand_in.answer(self.headers, body)
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            return None

    return Handler


def write_interpreter(path: Path, prelude: str = "", engine: str = "sglang") -> str:
    """Write an executable that starts a stand-in when it is run like an engine's interpreter.

    Args:
        prelude: shell commands to run first; ``exit 1`` makes a server that dies at its start.
    """
    version = {"sglang": "0.5.21", "vllm": "0.26.0"}[engine]
    says = f'{{"python": "3.11.0", "{engine}": "{version}"}}'  # asked what is installed
    path.write_text(
        f"#!/bin/sh\n[ \"$1\" = -c ] && echo '{says}' && exit\n"
        f'{prelude}\ncd {ROOT}\nexec {sys.executable} -m tests.{engine}_stand_in "$@"\n'
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
