"""An answer from the responses it came in."""

from __future__ import annotations

import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from nvlm_deploy.client.answer import Answer, AnswerBuilder, Piece, finish_reason
from nvlm_deploy.client.request import Generation
from nvlm_deploy.errors import MachineError, NvlmError


def response(text: str, tokens: int, *, reason: str = "", final: bool = False) -> service_pb2.ModelInferResponse:
    message = service_pb2.ModelInferResponse(model_name="nvlm")
    for name, value in (("text_output", text), ("finish_reason", reason)):
        message.outputs.add(name=name, datatype="BYTES", shape=[1])
        content = serialize_byte_tensor(np.array([value.encode()], dtype=np.object_))
        message.raw_output_contents.append(content.item())
    for name, number in (("num_input_tokens", 24), ("num_output_tokens", tokens)):
        message.outputs.add(name=name, datatype="INT32", shape=[1])
        message.raw_output_contents.append(np.array([number], dtype=np.int32).tobytes())
    message.parameters["triton_final_response"].bool_param = final
    return message


def empty_final_response() -> service_pb2.ModelInferResponse:
    message = service_pb2.ModelInferResponse(model_name="nvlm")
    message.parameters["triton_final_response"].bool_param = True
    return message


def built(*responses: service_pb2.ModelInferResponse) -> Answer:
    builder = AnswerBuilder("here:8001", Generation())
    for each in responses:
        builder.add(service_pb2.ModelStreamInferResponse(infer_response=each))
    return builder.answer()


def answer_with(arrivals: list[float]) -> Answer:
    pieces = tuple(Piece("x", arrived, number) for number, arrived in enumerate(arrivals, start=1))
    return Answer("x", "stop", 1, len(arrivals), sent_s=10.0, ended_s=arrivals[-1] + 0.5, pieces=pieces)


def test_pieces_are_joined_and_their_tokens_added_up() -> None:
    answer = built(response("1", 1), response("9", 1), response("", 0, reason="stop"), empty_final_response())
    assert (answer.text, answer.num_input_tokens, answer.num_output_tokens) == ("19", 24, 2)
    assert answer.finish_reason == "stop"
    assert [(piece.text, piece.output_tokens) for piece in answer.pieces] == [("1", 1), ("9", 2), ("", 2)]


def test_the_end_may_come_with_the_last_piece() -> None:
    assert built(response("19", 2, reason="stop", final=True)).text == "19"


def test_a_stream_that_stops_without_the_end_is_no_answer() -> None:
    with pytest.raises(MachineError, match="here:8001 stopped in the middle"):
        built(response("1", 1), response("9", 2))


def test_an_end_without_any_piece_is_no_answer() -> None:
    with pytest.raises(MachineError, match="in the middle"):
        built(empty_final_response())


def test_an_error_in_the_stream_is_raised_where_it_comes() -> None:
    builder = AnswerBuilder("here:8001", Generation())
    with pytest.raises(NvlmError, match="the question is empty"):
        builder.add(service_pb2.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: the question is empty"))


def test_pieces_arrive_after_sending_and_in_order() -> None:
    answer = built(response("1", 1), response("9", 2), empty_final_response())
    times = [answer.sent_s, *(piece.arrived_s for piece in answer.pieces), answer.ended_s]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("server_said", "tokens", "generation", "expected"),
    [
        ("stop", 8, Generation(max_tokens=8), "stop"),
        ("", 8, Generation(max_tokens=8), "length"),
        ("", 8, Generation(max_tokens=8, stop_words=("x",)), "length"),
        ("", 5, Generation(max_tokens=8, stop_words=("x",)), "stop"),
        ("", 128, Generation(), "length"),
        ("stop", 0, Generation(), "stop"),
    ],
)
def test_why_an_answer_ended(server_said: str, tokens: int, generation: Generation, expected: str) -> None:
    assert finish_reason(server_said, tokens, generation) == expected


def test_times_are_counted_from_sending_and_from_piece_to_piece() -> None:
    answer = answer_with([10.25, 10.5, 11.0])
    assert answer.time_to_first_token_s == 0.25
    assert answer.gaps_s == (0.25, 0.5)
    assert answer.time_per_token_s == 0.375
    assert answer.end_to_end_s == 1.5


def test_an_answer_in_one_piece_has_no_time_per_token() -> None:
    assert answer_with([10.25]).time_per_token_s is None
