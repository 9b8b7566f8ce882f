"""Whose fault a failure is, and what to do about it."""

from __future__ import annotations

import pytest

from nvlm_deploy.client.status import error_from_status, error_from_text
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.address import Address, Proxy, Route

URL = "gpu7:8001"
ROUTE = Route.to(Address("gpu7", 8001))
BY_PROXY = Route(ROUTE.address, Proxy("http_proxy", "http://user:secret@proxy:3128"))


def test_a_refused_request_is_wrong_input_in_the_servers_own_words() -> None:
    problem = error_from_text(
        ROUTE, "in ensemble 'nvlm', the question is empty\n  hint: put a question into text_input"
    )
    assert type(problem) is NvlmError
    assert (problem.message, problem.hint) == ("the question is empty", "put a question into text_input")


def test_a_code_in_front_of_the_text_decides_and_is_not_shown() -> None:
    assert (
        error_from_text(ROUTE, "in ensemble 'nvlm', INVALID_ARGUMENT: RuntimeError: no").message == "RuntimeError: no"
    )
    assert isinstance(error_from_text(ROUTE, "UNAVAILABLE: 64 requests wait already"), MachineError)


@pytest.mark.parametrize(
    "text",
    [
        "in ensemble 'nvlm', INTERNAL: RuntimeError: expected scalar type Float",
        "in ensemble 'nvlm', Failed to process the request(s) for model instance 'tensorrt_llm_0_0'",
        "Stub process 'preprocessing_0_0' is not healthy.",
        "in ensemble 'nvlm', [request id: 1] Exceeds maximum queue size",
        "Server exiting. Not accepting new requests",
    ],
)
def test_a_fault_of_the_server_is_not_blamed_on_the_request(text: str) -> None:
    problem = error_from_text(ROUTE, text)
    assert isinstance(problem, MachineError)
    assert URL in problem.message


def test_no_connection_names_the_address_and_how_to_start_a_server() -> None:
    problem = error_from_status(ROUTE, "UNAVAILABLE", "failed to connect to all addresses")
    assert isinstance(problem, MachineError)
    assert URL in problem.message
    assert "nvlm serve" in (problem.hint or "")


def test_a_server_without_the_ensemble_is_a_wrong_address() -> None:
    problem = error_from_status(ROUTE, "NOT_FOUND", "Request for unknown model: 'nvlm' is not found")
    assert type(problem) is NvlmError
    assert "no model nvlm" in problem.message


def test_too_late_is_the_machines_fault() -> None:
    assert isinstance(error_from_status(ROUTE, "DEADLINE_EXCEEDED", "Deadline Exceeded"), MachineError)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"])
def test_a_proxy_in_the_way_is_named_without_its_password(code: str) -> None:
    problem = error_from_status(BY_PROXY, code, "failed to connect to all addresses")
    assert "gpu7:8001 through the proxy http://proxy:3128 ($http_proxy)" in problem.message
    assert "secret" not in str(problem)
    assert "no_grpc_proxy=gpu7" in (problem.hint or "")


def test_a_connection_that_breaks_in_the_middle_says_so() -> None:
    problem = error_from_status(ROUTE, "UNAVAILABLE", "recvmsg:Connection reset by peer", has_begun=True)
    assert isinstance(problem, MachineError)
    assert "broke in the middle of an answer" in problem.message


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("UNAVAILABLE", "Trying to connect an http1.x server (HTTP status 400)"),
        ("UNIMPLEMENTED", "Received http2 header with status: 404"),
    ],
)
def test_what_speaks_no_grpc_is_not_called_silent(code: str, details: str) -> None:
    problem = error_from_status(ROUTE, code, details)
    assert "not gRPC" in problem.message
    assert "8000 is HTTP" in (problem.hint or "")


def test_a_grpc_service_that_is_not_tritons_is_a_wrong_address() -> None:
    assert type(error_from_status(ROUTE, "UNIMPLEMENTED", "Method not found!")) is NvlmError
