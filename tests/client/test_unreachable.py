"""Nobody there, nobody who answers, somebody else, or a proxy in the way: the same in both clients."""

from __future__ import annotations

import contextlib
import http.server
import math
import os
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from fake_triton import FakeTriton

from nvlm_deploy.client import AnswerCancelled
from nvlm_deploy.errors import MachineError, NvlmError

pytestmark = pytest.mark.slow


@pytest.fixture
def closed_port() -> Iterator[str]:
    """A port that is taken but not listened on, so that nobody else can come to listen there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent_port() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


class Proxy(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.send_error(403)

    do_GET = do_CONNECT  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch) -> Iterator[type[Proxy]]:
    """A proxy that lets nobody through and notes who asked; the environment names it."""
    for name in ("grpc_proxy", "https_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Noting", (Proxy,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def test_an_unreachable_server_is_named(client_class, closed_port: str) -> None:
    with client_class(closed_port) as client, pytest.raises(MachineError, match=f"no server answers at {closed_port}"):
        client.ask("hello").answer()


def test_a_host_that_nobody_knows_is_named(client_class) -> None:
    with (
        client_class("no-such-host.invalid:8001") as client,
        pytest.raises(MachineError, match=r"no server answers at no-such-host\.invalid:8001"),
    ):
        client.ask("hello").answer()


def test_a_server_that_never_answers_is_given_up(client_class, silent_port: str) -> None:
    with client_class(silent_port, timeout_s=0.2) as client, pytest.raises(MachineError, match=silent_port):
        client.ask("hello").answer()


def test_a_port_that_takes_connections_and_says_nothing_is_given_up_long_before_the_timeout(
    client_class, silent_port: str
) -> None:
    started_s = time.monotonic()
    with client_class(silent_port, timeout_s=300) as client, pytest.raises(MachineError, match=silent_port):
        client.ask("hello").answer()
    assert time.monotonic() - started_s < 10


def test_an_http_server_is_not_called_silent(client_class, proxy) -> None:
    """Triton's HTTP port in place of its gRPC port."""
    url = f"127.0.0.1:{os.environ['http_proxy'].rpartition(':')[2]}"
    with client_class(url) as client, pytest.raises(MachineError, match="is not gRPC") as failure:
        client.ask("hello").answer()
    assert "8000 is HTTP" in (failure.value.hint or "")


def test_a_missing_image_fails_before_anything_is_sent(client_class, closed_port: str, tmp_path) -> None:
    with client_class(closed_port) as client, pytest.raises(NvlmError, match="does not exist"):
        client.ask("hello", [tmp_path / "none.png"])


def test_a_cancelled_question_does_not_wait(client_class, silent_port: str) -> None:
    with client_class(silent_port) as client:
        stream = client.ask("hello")
        stream.cancel()
        with pytest.raises(AnswerCancelled):
            stream.answer()


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, 1e300, True, "3", None, [3]], ids=repr)
def test_a_time_that_is_none_is_refused_by_name(client_class, value) -> None:
    with pytest.raises(NvlmError, match=r"^timeout_s is .*, expected"):
        client_class("localhost:1", timeout_s=value)
    with client_class("localhost:1") as client, pytest.raises(NvlmError, match=r"^timeout_s is .*, expected"):
        client.wait_until_ready(value)


@pytest.mark.parametrize("value", [np.float32(30), np.int64(30), 30, 31_536_000])
def test_a_time_may_be_any_number(client_class, triton, value) -> None:
    with client_class(triton.url, timeout_s=value) as client:
        assert client.ask("go").answer().text == "19"


@pytest.mark.parametrize("url", ["", "http://localhost:8001", "localhost", "localhost:99999", "::1:8001", None, 8001])
def test_an_address_that_is_none_is_refused_when_the_client_is_made(client_class, url) -> None:
    with pytest.raises(NvlmError, match="address"):
        client_class(url)


# a server that comes and goes


@pytest.mark.slow
def test_a_client_finds_its_server_within_a_second_of_its_return(client_class, relay) -> None:
    """gRPC's own back-off would have grown to 40 s."""
    with client_class(relay.url, timeout_s=30) as client:
        assert client.ask("go").answer().text == "19"
        relay.cut()
        ended_s = time.monotonic() + 40
        while time.monotonic() < ended_s:
            with pytest.raises(MachineError, match="no server answers"):
                client.ask("go").answer()
            time.sleep(0.5)
        relay.connect()
        time.sleep(1)
        assert client.ask("go").answer().text == "19"


def test_a_client_finds_its_server_again_after_a_short_outage(client_class, relay) -> None:
    with client_class(relay.url, timeout_s=30) as client:
        client.ask("go").answer()
        relay.cut()
        for _ in range(20):
            with pytest.raises(MachineError, match="no server answers"):
                client.ask("go").answer()
            time.sleep(0.15)
        relay.connect()
        time.sleep(1)
        assert client.ask("go").answer().text == "19"


def test_a_server_that_comes_late_is_waited_for(client_class, relay) -> None:
    relay.cut()
    timer = threading.Timer(0.7, relay.connect)
    with client_class(relay.url) as client:
        started_s = time.monotonic()
        timer.start()
        client.wait_until_ready(20)
        assert 0.7 <= time.monotonic() - started_s < 3
        assert client.ask("go").answer().text == "19"
    timer.join()


def test_waiting_for_a_server_ends_in_time_and_says_what_is_missing(client_class, closed_port: str) -> None:
    started_s = time.monotonic()
    telling = f"no server was ready within 0.5 s: no server answers at {closed_port}"
    with client_class(closed_port) as client, pytest.raises(MachineError, match=telling) as failure:
        client.wait_until_ready(0.5)
    assert 0.5 <= time.monotonic() - started_s < 5
    assert "nvlm serve" in (failure.value.hint or "")


def test_a_server_whose_model_is_not_ready_is_waited_for(client, triton) -> None:
    triton.is_ready = False
    with pytest.raises(MachineError, match="runs, but its model nvlm is not ready"):
        client.wait_until_ready(0.5)
    threading.Timer(0.5, lambda: setattr(triton, "is_ready", True)).start()
    client.wait_until_ready(20)


# proxies


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "localhost", "LOCALHOST", "0.0.0.0", "::1", "::ffff:127.0.0.1"]
)
def test_this_machine_is_reached_past_any_proxy(client_class, proxy, monkeypatch, host) -> None:
    for variable in ("https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, os.environ["http_proxy"])
    with FakeTriton("[::]:0") as everywhere:
        url = f"[{host}]:{everywhere.port}" if ":" in host else f"{host}:{everywhere.port}"
        with client_class(url, timeout_s=30) as client:
            client.wait_until_ready(10)
            assert client.ask("go").answer().text == "19"
    assert not proxy.asked


@pytest.mark.parametrize("host", ["gpu7.invalid", "10.255.255.1", "[2001:db8::1]"])
def test_a_proxy_in_the_way_to_another_machine_is_named(client_class, proxy, host) -> None:
    with (
        client_class(f"{host}:8001", timeout_s=30) as client,
        pytest.raises(MachineError, match=r"through the proxy http://127.0.0.1:\d+ \(\$http_proxy\)") as failure,
    ):
        client.ask("go").answer()
    assert proxy.asked[0] == f"{host}:8001"
    assert "secret" not in str(failure.value)
    assert "no_grpc_proxy=" in (failure.value.hint or "")


@pytest.mark.parametrize(
    ("host", "without"),
    [("gpu7.invalid", "x, .invalid"), ("gpu7.invalid", "GPU7.invalid")],
)
def test_a_proxy_that_is_gone_past_is_neither_asked_nor_named(client_class, proxy, monkeypatch, host, without) -> None:
    monkeypatch.setenv("no_proxy", without)
    with client_class(f"{host}:8001", timeout_s=1) as client, pytest.raises(MachineError) as failure:
        client.ask("go").answer()
    assert "proxy" not in str(failure.value)
    assert not proxy.asked


def test_no_grpc_proxy_goes_before_no_proxy_and_a_proxy_of_nothing_is_none(client_class, proxy, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "gpu7.invalid")
    monkeypatch.setenv("no_grpc_proxy", "other")
    with client_class("gpu7.invalid:8001", timeout_s=5) as client, pytest.raises(MachineError, match="proxy"):
        client.ask("go").answer()
    monkeypatch.setenv("grpc_proxy", "")
    asked = len(proxy.asked)
    with client_class("gpu7.invalid:8001", timeout_s=5) as client, pytest.raises(MachineError) as failure:
        client.ask("go").answer()
    assert "proxy" not in str(failure.value)
    assert len(proxy.asked) == asked


def test_the_silence_of_another_machine_behind_a_proxy_names_it(client_class, silent_port, monkeypatch) -> None:
    monkeypatch.setenv("grpc_proxy", f"http://{silent_port}")
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("no_proxy")
    with (
        client_class("gpu7.invalid:8001", timeout_s=0.5) as client,
        pytest.raises(MachineError, match=r"through the proxy .*\$grpc_proxy.*in time"),
    ):
        client.ask("go").answer()
