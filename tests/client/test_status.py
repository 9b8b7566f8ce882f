"""Whose fault a failure is, and what to do about it."""

from __future__ import annotations

import pytest

from nvlm_deploy.client.status import error_from_status, error_from_text
from nvlm_deploy.errors import MachineError, NvlmError

URL = "gpu7:8001"


def test_a_refused_request_is_wrong_input_in_the_servers_own_words() -> None:
    problem = error_from_text(URL, "in ensemble 'nvlm', the question is empty\n  hint: put a question into text_input")
    assert type(problem) is NvlmError
    assert (problem.message, problem.hint) == ("the question is empty", "put a question into text_input")


def test_a_code_in_front_of_the_text_decides_and_is_not_shown() -> None:
    assert error_from_text(URL, "in ensemble 'nvlm', INVALID_ARGUMENT: RuntimeError: no").message == "RuntimeError: no"
    assert isinstance(error_from_text(URL, "UNAVAILABLE: 64 requests wait already"), MachineError)


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
    problem = error_from_text(URL, text)
    assert isinstance(problem, MachineError)
    assert URL in problem.message


def test_no_connection_names_the_address_and_how_to_start_a_server() -> None:
    problem = error_from_status(URL, "UNAVAILABLE", "failed to connect to all addresses")
    assert isinstance(problem, MachineError)
    assert URL in problem.message
    assert "nvlm serve" in (problem.hint or "")


def test_a_server_without_the_ensemble_is_a_wrong_address() -> None:
    problem = error_from_status(URL, "NOT_FOUND", "Request for unknown model: 'nvlm' is not found")
    assert type(problem) is NvlmError
    assert "no model nvlm" in problem.message


def test_too_late_is_the_machines_fault() -> None:
    assert isinstance(error_from_status(URL, "DEADLINE_EXCEEDED", "Deadline Exceeded"), MachineError)
