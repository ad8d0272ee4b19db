"""A small server that answers ``/v1/completions`` as vLLM does, for machines that have no vLLM.

The numpy model of `tests.sglang_stand_in` behind the JSON of vLLM 0.32: logprobs of the whole
prompt, an object of token ids at every place with the prompt's token first, -9999 for minus
infinity. Its replies have no faults; `tests.fault_proxy` makes those. As a process it replaces the
interpreter that has vLLM, and reads the configuration file of ``vllm serve``.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from tests.sglang_stand_in import Array, NumpyQwen3, StandInServer, log_softmax, truncated_logprobs

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class VllmStandIn:
    """Answers requests with one model.

    Args:
        logprobs_mode: which logprobs of sampled tokens it gives.
        max_logprobs: candidates that a request may ask for.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        api_key: str | None = None,
        logprobs_mode: LogprobsMode = "processed_logprobs",
        max_logprobs: int = 20,
    ) -> None:
        self._model = NumpyQwen3(Path(model_dir))
        self._api_key = api_key
        self._mode = logprobs_mode
        self._max_logprobs = max_logprobs
        self._lock = threading.Lock()

    def answer(self, headers: Any, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON of a reply."""
        if self._api_key and headers.get("Authorization") != f"Bearer {self._api_key}":
            return 401, {"error": "Unauthorized"}
        request = json.loads(body)
        if (asked := request.get("prompt_logprobs") or 0) > self._max_logprobs:
            return refused(
                f"Requested prompt logprobs of {asked}, which is greater than max allowed: "
                f"{self._max_logprobs}"
            )
        limit = self._model.config["max_position_embeddings"]
        if any(len(ids) > limit for ids in request["prompt"]):
            return refused(f"This model's maximum context length is {limit} tokens.")
        with self._lock:
            choices = [self._choice(request, i) for i in range(len(request["prompt"]))]
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": choices}

    def _choice(self, request: dict[str, Any], index: int) -> dict[str, Any]:
        ids = request["prompt"][index]
        new, logprobs = self._sampled(request, ids)
        stopped = new[-1] in request.get("stop_token_ids", [])
        choice: dict[str, Any] = {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": "stop" if stopped else "length",
            "token_ids": new,
            "prompt_logprobs": None,
            "prompt_token_ids": ids,
        }
        if request.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(ids, request["prompt_logprobs"])
        if request.get("logprobs") is not None:
            names = [f"token_id:{token}" for token in new]
            choice["logprobs"] = {"tokens": names, "token_logprobs": logprobs}
        return choice

    def _prompt_logprobs(self, ids: list[int], k: int) -> list[Any]:
        logprobs_TV = log_softmax(self._model.logits(ids))[:-1]
        places: list[Any] = [None]
        for row_V, token in zip(logprobs_TV, ids[1:], strict=True):
            rank = int((row_V >= row_V[token]).sum())
            place = {str(token): _member(row_V[token], rank)}
            # A candidate's member replaces that of the same token, which stays in front.
            for i, candidate in enumerate(np.argsort(-row_V)[:k]):
                place[str(candidate)] = _member(row_V[candidate], i + 1)
            places.append(place)
        return places

    def _sampled(self, request: dict[str, Any], ids: list[int]) -> tuple[list[int], list[float]]:
        rng = np.random.default_rng(request.get("seed"))
        temperature, new, given = request["temperature"], list[int](), list[float]()
        sampling = {"top_p": request.get("top_p", 1.0), "top_k": request.get("top_k", 0)}
        while len(new) < request["max_tokens"]:
            raw_V = log_softmax(self._model.logits([*ids, *new])[-1].astype(np.float64))
            kept_V = truncated_logprobs(log_softmax(raw_V / (temperature or 1.0)), sampling)
            token = int(raw_V.argmax())
            if temperature > 0:
                token = int(rng.choice(len(kept_V), p=np.exp(kept_V)))
            new.append(token)
            given.append(float((raw_V if self._mode == "raw_logprobs" else kept_V)[token]))
            if token in request.get("stop_token_ids", []):
                break
        return new, given


def refused(message: str) -> tuple[int, Any]:
    return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}


def _member(logprob: Array, rank: int) -> dict[str, Any]:
    return {"logprob": float(logprob), "rank": rank, "decoded_token": None}


def main() -> None:
    settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    stand_in = VllmStandIn(
        settings["model"],
        api_key=os.environ["VLLM_API_KEY"],
        logprobs_mode=settings["logprobs-mode"],
        max_logprobs=settings["max-logprobs"],
    )
    print("Application startup complete.", flush=True)  # noqa: T201
    StandInServer(stand_in, settings["port"]).serve()


if __name__ == "__main__":
    main()
