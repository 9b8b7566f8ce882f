"""An answer from the responses it came in."""

from __future__ import annotations

import pytest
from fake_triton import piece as response
from fake_triton import the_end as empty_final_response
from tritonclient.grpc import service_pb2

from nvlm_deploy.client.answer import Answer, AnswerBuilder, Piece
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.address import Address, Route

HERE = Route.to(Address("here", 8001))


def built(*responses: service_pb2.ModelInferResponse) -> Answer:
    builder = AnswerBuilder(HERE)
    for each in responses:
        builder.add(service_pb2.ModelStreamInferResponse(infer_response=each))
    return builder.answer()


def answer_with(arrivals: list[float]) -> Answer:
    pieces = tuple(Piece("x", arrived, number) for number, arrived in enumerate(arrivals, start=1))
    return Answer("x", "stop", 1, len(arrivals), sent_s=10.0, ended_s=arrivals[-1] + 0.5, pieces=pieces)


def test_pieces_are_joined_and_their_tokens_added_up() -> None:
    answer = built(response("1"), response("9"), response("", tokens=0, reason="stop"), empty_final_response())
    assert (answer.text, answer.num_input_tokens, answer.num_output_tokens) == ("19", 24, 2)
    assert answer.finish_reason == "stop"
    assert [(piece.text, piece.output_tokens) for piece in answer.pieces] == [("1", 1), ("9", 2), ("", 2)]


def test_the_end_may_come_with_the_last_piece() -> None:
    assert built(response("19", tokens=2, reason="stop", final=True)).text == "19"


def test_a_stream_that_stops_without_the_end_is_no_answer() -> None:
    with pytest.raises(MachineError, match="here:8001 stopped in the middle"):
        built(response("1"), response("9", tokens=2))


def test_an_end_without_any_piece_is_no_answer() -> None:
    with pytest.raises(MachineError, match="in the middle"):
        built(empty_final_response())


def test_an_error_in_the_stream_is_raised_where_it_comes() -> None:
    builder = AnswerBuilder(HERE)
    with pytest.raises(NvlmError, match="the question is empty"):
        builder.add(service_pb2.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: the question is empty"))


def test_pieces_arrive_after_sending_and_in_order() -> None:
    answer = built(response("1"), response("9", tokens=2), empty_final_response())
    times = [answer.sent_s, *(piece.arrived_s for piece in answer.pieces), answer.ended_s]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (("", "stop"), "stop"),
        (("", "length"), "length"),
        (("stop", ""), "stop"),
        (("", ""), "length"),  # a server that names no reason has cut the answer
    ],
)
def test_why_an_answer_ended_is_the_servers_word(said: tuple[str, str], expected: str) -> None:
    pieces = [response("x", reason=reason) for reason in said]
    assert built(*pieces, empty_final_response()).finish_reason == expected


def test_an_answer_of_another_model_is_no_answer() -> None:
    foreign = service_pb2.ModelInferResponse(model_name="nvlm")
    foreign.outputs.add(name="logits", datatype="FP32", shape=[1])
    foreign.raw_output_contents.append(bytes(4))
    with pytest.raises(MachineError, match=r"answers with logits; expected text_output, finish_reason"):
        built(foreign)


def test_text_that_is_not_utf_8_is_shown_with_marks() -> None:
    broken = response("é")
    broken.raw_output_contents[0] = b"\x01\x00\x00\x00\xff"
    assert built(broken, empty_final_response()).text == "\ufffd"


def test_what_has_come_so_far_is_there_before_the_end() -> None:
    builder = AnswerBuilder(HERE)
    assert (builder.text, builder.has_begun) == ("", False)
    builder.add(service_pb2.ModelStreamInferResponse(infer_response=response("1")))
    assert (builder.text, builder.has_begun) == ("1", True)


def test_times_are_counted_from_sending_and_from_piece_to_piece() -> None:
    answer = answer_with([10.25, 10.5, 11.0])
    assert answer.time_to_first_token_s == 0.25
    assert answer.gaps_s == (0.25, 0.5)
    assert answer.time_per_token_s == 0.375
    assert answer.end_to_end_s == 1.5


def test_an_answer_in_one_piece_has_no_time_per_token() -> None:
    assert answer_with([10.25]).time_per_token_s is None
