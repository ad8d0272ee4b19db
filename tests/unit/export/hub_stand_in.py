"""A local stand-in for what of the hub's HTTP interface a push uses."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_stand_in"


@dataclass
class HubStandIn:
    """One account, its repositories, and what it shall refuse."""

    url: str = ""
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and message by the beginning of a path."""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        self.requests.append(path)
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        for start, (status, message) in self.refuse.items():
            if path.startswith(start):
                return status, {"error": message, "errors": [{"message": message}]}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if "/preupload/" in path:
            return 200, {"files": [_regular(file["path"]) for file in json.loads(body)["files"]]}
        if "/commit/" in path:
            return self._commit(path, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"the stand-in has no {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.private:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.url}/{name}",
            }
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return 200, {"url": f"{self.url}/{name}"}

    def _commit(self, path: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/abc", "commitOid": "abc"}


def _regular(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None}


@contextmanager
def serve_hub() -> Iterator[HubStandIn]:
    """The stand-in on a free port of this machine."""
    hub = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = hub.answer(self.path.partition("?")[0], body, token)
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
            self.end_headers()
            self.wfile.write(encoded)

        do_GET = do_POST = _handle

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
