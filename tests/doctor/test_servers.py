"""The doctor's checks of scoring servers: stand-ins of SGLang and vLLM behind a bad proxy."""

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwen3_distill.config import RunConfig
from qwen3_distill.pipeline.assembly import teachers
from qwen3_distill.pipeline.finding import Status
from qwen3_distill.types import SampledRequest
from tests.contract.served_adapter import STAND_INS, Served, sglang_config
from tests.doctor.worlds import World, by_name, make_world, with_status
from tests.fault_proxy import Fault, spoiled
from tests.pipeline.builders import tiny_config
from tests.sglang_stand_in import StandIn, StandInServer
from tests.tiny_models import TinyModels
from tests.vllm_stand_in import VllmStandIn


@pytest.fixture(params=STAND_INS)
def served(request: pytest.FixtureRequest) -> Served:
    return request.param


Spoils = Callable[[dict[str, Any]], bool]


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Serve in a thread; give the server's address."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def proxy(upstream: str, spoils: Spoils) -> ThreadingHTTPServer:
    """Make a server that forwards requests, and halves the logprobs of some replies."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = urllib.request.Request(
                upstream + self.path, data=body, headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as answer:
                reply = answer.read()
            if spoils(json.loads(body)):
                reply = spoiled(Fault.SCALED, reply)
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextmanager
def with_servers(world: World, served: Served, *spoils: Spoils) -> Iterator[None]:
    """Let the teacher be as many servers as there are ``spoils``, each behind its proxy."""
    with ExitStack() as stack:
        stand_in = StandIn if served.engine == "sglang" else VllmStandIn
        upstream = StandInServer(stand_in(world.teacher)).start()
        stack.callback(upstream.close)
        urls = [stack.enter_context(serving(proxy(upstream.url, one))) for one in spoils]
        config = served.config(world.teacher, urls=tuple(urls))
        world.changes["scoring"] = config.model_dump(exclude={"python", "environment"})
        yield


def never(request: dict[str, Any]) -> bool:
    return False


def at_other_temperature(request: dict[str, Any]) -> bool:
    return request.get("sampling_params", request)["temperature"] != 1.0


def test_servers_that_score_alike_pass(tmp_path: Path, served: Served) -> None:
    world = make_world(tmp_path)
    with with_servers(world, served, never, never):
        diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL, Status.WARN) == []
    for line in ("scores of every server", "scores at another temperature"):
        assert by_name(diagnosis)[line].status is Status.PASS


def test_a_server_that_applies_the_temperature_fails_that_line_alone(
    tmp_path: Path, served: Served
) -> None:
    world = make_world(tmp_path)
    with with_servers(world, served, at_other_temperature):
        diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL) == ["scores at another temperature"]
    assert with_status(diagnosis, Status.WARN) == []


def test_a_server_that_scores_otherwise_fails_the_line_of_every_server(
    tmp_path: Path, served: Served
) -> None:
    world = make_world(tmp_path)
    with with_servers(world, served, never, lambda request: True):
        world.changes["scoring"]["readiness_tolerance_nats"] = 1000.0  # or it would not start
        diagnosis = world.diagnose()
    assert "scores of every server" in with_status(diagnosis, Status.FAIL)


def test_a_server_of_another_model_does_not_start(tmp_path: Path, served: Served) -> None:
    world = make_world(tmp_path)
    with with_servers(world, served, lambda request: True):
        diagnosis = world.diagnose()
    assert with_status(diagnosis, Status.FAIL) == ["engines start"]
    assert "does not score as" in by_name(diagnosis)["engines start"].verdict.found
    assert by_name(diagnosis)["engines end"].status is Status.SKIP


def test_a_run_with_its_own_server_has_no_others_to_plan_for(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run's engines hold the memory then, so a plan would say that nothing fits."""

    def plan(config: RunConfig) -> None:
        raise AssertionError("a plan was made")

    monkeypatch.setattr(teachers, "plan_memory", plan)
    config = tiny_config(tiny_models, tmp_path).model_copy(
        update={"scoring": sglang_config(tiny_models.teacher, "stand_in")}
    )
    assert teachers.each_server(config, SampledRequest()) == {}
