"""Addresses to listen on: names, IPv4 and IPv6, and what is wrong with those that cannot be used."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from dataclasses import replace

import pytest

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.triton.ports import Ports
from nvlm_deploy.triton.server import _answers


@pytest.mark.parametrize(
    ("host", "grpc", "other"),
    [
        ("127.0.0.9", "127.0.0.9", "127.0.0.9"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]", "ipv6:::1"),
        ("[::1]", "[::1]", "ipv6:::1"),
        ("::", "[::]", "ipv6:::"),
        ("gpu7.invalid", "gpu7.invalid", "gpu7.invalid"),  # for another machine
    ],
)
def test_each_service_of_triton_is_told_the_address_as_it_wants_it(host, grpc, other) -> None:
    assert Ports(host=host).address_arguments() == [
        f"--grpc-address={grpc}",
        f"--http-address={other}",
        f"--metrics-address={other}",
    ]


@pytest.mark.parametrize(
    ("host", "grpc_url", "ready"),
    [
        ("127.0.0.1", "127.0.0.1:1", "127.0.0.1:2"),
        ("localhost", "localhost:1", "127.0.0.1:2"),
        ("0.0.0.0", "0.0.0.0:1", "127.0.0.1:2"),
        ("::1", "[::1]:1", "[::1]:2"),
        ("::", "[::]:1", "[::1]:2"),
        ("[::1]", "[::1]:1", "[::1]:2"),
    ],
)
def test_an_ipv6_address_has_brackets_before_its_port(host, grpc_url, ready) -> None:
    ports = Ports(1, 2, 3, host)
    assert ports.grpc_url == grpc_url
    assert ports.readiness_url == f"http://{ready}/v2/health/ready"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "[::1]", "::"])
def test_every_address_of_this_machine_can_be_listened_on(host) -> None:
    replace(Ports.free(), host=host).require_free()


@pytest.mark.parametrize("host", ["192.0.2.1", "8.8.8.8", "2001:db8::1"])
def test_the_address_of_another_machine_is_called_so(host) -> None:
    with pytest.raises(MachineError, match=f"{host} is not an address of this machine") as failure:
        replace(Ports.free(), host=host).require_free()
    assert "ip address" in (failure.value.hint or "")
    assert "stop what listens" not in str(failure.value)


@pytest.mark.parametrize("host", ["a..b", "no.such.host.invalid", "300.1.1.1", "::1::", "[", "-"])
def test_a_name_that_nobody_knows_is_called_so(host) -> None:
    with pytest.raises(MachineError, match=r"cannot be used: no host and no address of the name") as failure:
        replace(Ports.free(), host=host).require_free()
    assert "127.0.0.1" in (failure.value.hint or "")


def test_an_interface_is_not_an_address_that_triton_takes() -> None:
    with pytest.raises(NvlmError, match="fe80::1%eth0 names an interface"):
        Ports(host="fe80::1%eth0").require_usable()


def test_a_port_in_use_on_ipv6_is_named() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"gRPC port {port} on ::1 .*in use") as failure:
            replace(Ports.free(), grpc=port, host="::1").require_free()
    assert "stop what listens there" in (failure.value.hint or "")


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server6(http.server.HTTPServer):
    address_family = socket.AF_INET6


@pytest.mark.parametrize(("kind", "host"), [(http.server.HTTPServer, "127.0.0.1"), (Server6, "::1")])
def test_readiness_is_asked_past_any_proxy(kind, host, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with kind((host, 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert _answers(Ports(1, server.server_port, 3, host).readiness_url)
        server.shutdown()
    assert os.environ["http_proxy"]
    assert not _answers(Ports(1, 9, 3, host).readiness_url)
