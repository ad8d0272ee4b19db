"""A small server that answers as the Hugging Face hub does, for machines without the hub.

It is a stand-in: it knows the requests that huggingface_hub 1 and 2 make to look up a repository
and to download its files, and no others. ``HF_ENDPOINT`` points at it. Commits are 40 hexadecimal
digits over the repository's name and a number; etags are the files' SHA-1, as git has them.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_the_stand_in"


def commit_of(repo: str, number: int = 0) -> str:
    """Return the commit hash of a repository's commit ``number``."""
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


@dataclass
class Repository:
    """Files of a repository at one or more commits."""

    files: dict[str, Mapping[str, bytes]]
    """By commit."""
    branches: dict[str, str]
    access: Literal["public", "gated", "private"] = "public"
    kind: Literal["models", "datasets"] = "models"

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.files else None


@dataclass
class HubStandIn:
    """The repositories of the server, and the requests that it has answered."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    """Ranges of files that were asked for."""
    status: int | None = None
    """Answer everything with this status."""
    cuts: int = 0
    """Break off this many downloads of a safetensors file in its middle."""
    url: str = ""

    def add(self, repo: str, folder: Path, **settings: Any) -> str:
        """Add a commit with a folder's files to a repository's main branch; return it."""
        known = self.repositories.setdefault(repo, Repository(files={}, branches={}, **settings))
        commit = commit_of(repo, len(known.files))
        known.files[commit] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        known.branches["main"] = commit
        return commit

    def downloads(self) -> list[str]:
        """List the files that were downloaded."""
        return [line.rsplit("/", 1)[-1] for line in self.requests if line.startswith("GET file ")]


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            if hub.status is not None:
                return self._fail(hub.status, "", "the stand-in was told to fail")
            path = unquote(urlsplit(self.path).path).strip("/")
            parts = path.split("/")
            if parts[0] == "api" and len(parts) >= 4:
                return self._describe(parts[1], "/".join(parts[2:4]), parts[4:])
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            if len(parts) >= 5 and parts[2] == "resolve":
                return self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            return self._fail(404, "EntryNotFound", f"no such page: {path}")

        def _repository(self, kind: str, repo: str) -> Repository | None:
            known = hub.repositories.get(repo)
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            hidden = known is not None and known.access == "private" and not authorized
            if known is None or known.kind != kind or hidden:
                self._fail(401 if not authorized else 404, "RepoNotFound", "Repository not found")
                return None
            return known

        def _describe(self, kind: str, repo: str, rest: list[str]) -> None:
            known = self._repository(kind, repo)
            if known is None:
                return
            hub.requests.append(f"{self.command} info {repo}")
            commit = known.resolve("/".join(rest[1:]) if rest else "main")
            if commit is None:
                return self._fail(404, "RevisionNotFound", "Invalid rev id")
            files = known.files[commit].items()
            if rest and rest[0] == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in files
                ]
                return self._send(json.dumps(entries).encode(), {"X-Repo-Commit": commit})
            value = {
                "id": repo,
                "sha": commit,
                "private": known.access == "private",
                "gated": "manual" if known.access == "gated" else False,
                "siblings": [{"rfilename": name, "size": len(text)} for name, text in files],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            return self._send(json.dumps(value).encode(), {"X-Repo-Commit": commit})

        def _file(self, kind: str, repo: str, revision: str, name: str) -> None:
            known = self._repository(kind, repo)
            if known is None:
                return
            if known.access == "gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._fail(403, "GatedRepo", "Access to this repository is restricted")
            commit = known.resolve(revision)
            if commit is None:
                return self._fail(404, "RevisionNotFound", "Invalid rev id")
            if name not in known.files[commit]:
                return self._fail(404, "EntryNotFound", "Entry not found")
            content = known.files[commit][name]
            asked = self.headers.get("Range", "")
            hub.requests.append(f"{self.command} file {repo}/{name}")
            if asked and asked != "bytes=0-":
                hub.ranges.append(asked)
            if self.command == "GET" and hub.cuts and name.endswith(".safetensors"):
                hub.cuts -= 1
                return self._cut(content)
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}
            return self._send(content, headers, ranged=True)

        def _send(self, content: bytes, headers: Mapping[str, str], ranged: bool = False) -> None:
            start, total = 0, len(content)
            asked = self.headers.get("Range", "")
            if ranged and asked.startswith("bytes=") and self.command == "GET":
                start = int(asked.removeprefix("bytes=").split("-")[0] or 0)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[start:])

        def _cut(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True

        def _fail(self, status: int, code: str, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    """Run the server on a free port of loopback."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Point huggingface_hub at a hub and a cache, as its environment variables do at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
