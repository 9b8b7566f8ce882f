"""The options of a request: what is left out, what is refused, and with which name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.serving import backend, options
from nvlm_deploy.serving.options import Sampling, ask_from_request, words_from


class Tensor:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def as_numpy(self) -> np.ndarray:
        return self.values


class Request:
    """A request as Triton's python backend shows it."""

    def __init__(self, parameters: dict | None = None, timeout_us: int = 0, **inputs: list) -> None:
        self.tensors = {name: self.tensor(name, values) for name, values in inputs.items()}
        self.given = parameters
        self.timeout_us = timeout_us

    @staticmethod
    def tensor(name: str, values: list) -> Tensor:
        spec = next(spec for spec in tensors.REQUEST_INPUTS if spec.name == name)
        return Tensor(np.array(values, dtype=np.object_ if spec.dtype == "string" else spec.dtype))

    def parameters(self) -> str:
        return json.dumps(self.given) if self.given else ""

    def timeout(self) -> int:
        return self.timeout_us


@pytest.fixture(autouse=True)
def triton(monkeypatch) -> None:
    class Utils:
        @staticmethod
        def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
            return request.tensors.get(name)

    monkeypatch.setattr(backend, "backend_module", lambda: Utils)


def ask(**inputs: list):
    return ask_from_request(Request(text_input=[b"What?"], **inputs))


OPTIONAL = [spec for spec in tensors.REQUEST_INPUTS if spec.optional]


@pytest.mark.parametrize("name", [spec.name for spec in OPTIONAL])
def test_an_empty_list_means_left_out(name) -> None:
    assert ask(**{name: []}) == ask()


@pytest.mark.parametrize("name", [spec.name for spec in OPTIONAL if spec.dtype == "string"])
@pytest.mark.parametrize("values", [[b""], [b"", b""]])
def test_an_empty_text_means_left_out(name, values) -> None:
    assert ask(**{name: values}) == ask()


def test_empty_words_beside_others_are_passed_over() -> None:
    assert ask(stop_words=[b"", b"x", b"", b"y", b"x"]).stop_words == ("x", "y")


def test_every_option_is_read() -> None:
    given = {
        "image": [b"file"], "max_tokens": [7], "temperature": [0.5], "top_k": [3], "top_p": [0.25],
        "repetition_penalty": [1.5], "presence_penalty": [0.5], "frequency_penalty": [-0.5], "min_tokens": [2],
        "seed": [9], "stop_words": [b"x"], "bad_words": [b"y"], "stream": [True],
    }  # fmt: skip
    assert {"text_input", *given} == {spec.name for spec in tensors.REQUEST_INPUTS}
    found = ask(**given)
    assert (found.images, found.max_tokens, found.stream) == ((b"file",), 7, True)
    assert (found.stop_words, found.bad_words) == (("x",), ("y",))
    assert found.sampling == Sampling(0.5, 3, 0.25, 1.5, 0.5, -0.5, 2, 9)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_token", "max_tokens"), ("max_new_tokens", "max_tokens"), ("min_length", "min_tokens"),
        ("random_seed", "seed"), ("stop", "stop_words"), ("stop_word", "stop_words"), ("images", "image"),
        ("temprature", "temperature"), ("Top_P", "top_p"), ("prompt", "text_input"), ("streaming", "stream"),
    ],
)  # fmt: skip
def test_an_unknown_option_is_refused_with_the_nearest_known_one(name, nearest) -> None:
    with pytest.raises(NvlmError, match=f"option {name} is not known") as failure:
        ask_from_request(Request({name: 5}, text_input=[b"What?"]))
    assert failure.value.hint == f"did you mean {nearest}?"


@pytest.mark.parametrize("name", ["beam_width", "num_beams", "timeout", "priority", "n", "logprobs", "x" * 500, ""])
def test_an_option_like_no_other_is_refused_with_those_there_are(name) -> None:
    with pytest.raises(NvlmError, match="is not known or not honoured here") as failure:
        ask_from_request(Request({name: 5}, text_input=[b"What?"]))
    assert all(spec.name in str(failure.value.hint) for spec in tensors.REQUEST_INPUTS)


def test_tritons_own_parameters_are_not_options() -> None:
    ask_from_request(Request({"triton_enable_empty_final_response": True}, text_input=[b"What?"]))


def test_a_deadline_for_the_server_is_refused_and_not_dropped() -> None:
    with pytest.raises(NvlmError, match="option timeout"):
        ask_from_request(Request(timeout_us=5, text_input=[b"What?"]))


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"max_tokens": [0]}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": [1, 2]}, "max_tokens holds 2 values"),
        ({"min_tokens": [-1]}, "min_tokens is -1, expected at least 0"),
        ({"temperature": [float("inf")]}, "temperature is inf"),
        ({"top_k": [1025]}, "top_k is 1025, expected 0 to 1024"),
        ({"top_p": [-0.5]}, "top_p is -0.5"),
        ({"repetition_penalty": [float("nan")]}, "repetition_penalty is nan"),
        ({"presence_penalty": [101]}, "presence_penalty is 101"),
        ({"frequency_penalty": [float("-inf")]}, "frequency_penalty is -inf"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(inputs, word) -> None:
    with pytest.raises(NvlmError) as failure:
        ask(**inputs)
    assert word in str(failure.value)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([str(number).encode() for number in range(65)], "words holds 65 words, at most 64"),
        ([b"x" * 1025], "words holds a word of 1025 bytes, at most 1024"),
        ([b"\xff"], "words is not UTF-8"),
    ],
)
def test_words_that_cannot_be_served_are_refused(values, word) -> None:
    with pytest.raises(NvlmError) as failure:
        words_from(values, name="words")
    assert word in str(failure.value)


def test_every_other_name_leads_to_an_option_that_there_is() -> None:
    assert set(options._OTHER_NAMES.values()) <= set(options.OPTIONS)
    assert not set(options._OTHER_NAMES) & set(options.OPTIONS)
