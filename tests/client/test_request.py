"""What the clients send: KServe's own reading of it must give the values back."""

from __future__ import annotations

import decimal
import fractions
import math
from pathlib import Path

import numpy as np
import pytest
from fake_triton import received
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from nvlm_deploy import tensors
from nvlm_deploy.client import wire
from nvlm_deploy.client.images import image_bytes
from nvlm_deploy.client.request import Generation, input_tensors
from nvlm_deploy.client.wire import infer_request
from nvlm_deploy.errors import NvlmError

DEFAULTS = Generation()
WHOLE = {"max_tokens": 2**31 - 1, "top_k": 2**31 - 1, "min_tokens": 2**31 - 1, "seed": 2**64 - 1}
REAL = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
WORDS = ("stop_words", "bad_words")


def sent(question: str = "why?", images=(), generation: Generation = DEFAULTS) -> dict[str, list]:
    """The request's tensors, read back with NVIDIA's own functions."""
    message = infer_request(input_tensors(question, images, generation)).SerializeToString()
    return received(service_pb2.ModelInferRequest.FromString(message))


def test_a_bare_question_sends_nothing_but_itself_and_asks_for_a_stream() -> None:
    assert sent("wie groß?") == {"text_input": ["wie groß?".encode()], "stream": [True]}


def test_everything_that_is_given_arrives() -> None:
    generation = Generation(7, 0.5, 3, 0.25, 1.5, 2**64 - 1, ("a", "b\n"), ["c"], -0.5, 0.75, 2)
    values = sent("q", [b"one", b"second"], generation)
    assert values["image"] == [b"one", b"second"]
    assert values["stop_words"] == [b"a", b"b\n"]
    assert values["bad_words"] == [b"c"]
    numbers = {name: values[name][0] for name in (*WHOLE, *REAL)}
    assert numbers == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "repetition_penalty": 1.5,
        "seed": 2**64 - 1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "min_tokens": 2,
    }


def test_every_input_of_the_ensemble_can_be_sent_and_no_other() -> None:
    values = sent("q", [b"x"], Generation(1, 1.0, 1, 1.0, 1.0, 1, ("x",), ("y",), 1.0, 1.0, 1))
    assert values.keys() == {spec.name for spec in tensors.REQUEST_INPUTS}


def test_every_request_has_an_id_of_its_own() -> None:
    ids = {infer_request(input_tensors("q", [], Generation())).id for _ in range(100)}
    assert len(ids) == 100 and "" not in ids


def test_the_server_is_asked_to_say_the_end() -> None:
    request = infer_request(input_tensors("q", [], Generation()))
    assert request.parameters["triton_enable_empty_final_response"].bool_param


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8, np.int16])
def test_a_whole_number_of_python_or_numpy_arrives(name, kind) -> None:
    assert sent(generation=Generation(**{name: kind(7)}))[name] == [7]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", [float, int, np.float32, np.float64, np.float16, np.int64, fractions.Fraction])
def test_a_real_number_of_python_or_numpy_arrives(name, kind) -> None:
    assert sent(generation=Generation(**{name: kind(1)}))[name] == [1.0]


NO_NUMBERS = [True, False, np.True_, "7", "", b"7", [7], (7,), {}, np.array(7), np.array([7]), 1j, decimal.Decimal(1)]


@pytest.mark.parametrize("name", [*WHOLE, *REAL])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_name_and_type(name, value) -> None:
    with pytest.raises(NvlmError, match=rf"^{name} is .*\({type(value).__name__}\), expected a"):
        Generation(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.9, 1.0, np.float64(2), math.nan, math.inf, fractions.Fraction(3)], ids=repr)
def test_a_whole_number_is_never_rounded(name, value) -> None:
    with pytest.raises(NvlmError, match=f"^{name} is .*, expected an integer"):
        Generation(**{name: value})


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_that_its_tensor_cannot_hold_is_refused(name) -> None:
    most = WHOLE[name]
    least = 0 if name == "seed" else -most - 1
    for value in (most, least, np.array([most]).astype(np.uint64)[0]):
        assert sent(generation=Generation(**{name: value}))[name] == [int(value)]
    for value in (most + 1, least - 1, 10**400, -(10**400)):
        with pytest.raises(NvlmError, match=f"^{name} is .*, expected {least} to {most}"):
            Generation(**{name: value})


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e39, -1e39, 1e300, 10**400, 1e-60, np.float32("nan")], ids=repr
)
def test_a_real_number_that_its_tensor_cannot_hold_is_refused(name, value) -> None:
    with pytest.raises(NvlmError, match=f"^{name} is .*, expected"):
        Generation(**{name: value})


@given(st.sampled_from(REAL), st.floats())
def test_a_real_number_arrives_as_the_nearest_float32_or_not_at_all(name, value) -> None:
    try:
        generation = Generation(**{name: value})
    except NvlmError as refused:
        assert name in refused.message
        assert not math.isfinite(value) or not 1.1e-38 < abs(value) < 3.5e38
    else:
        assert sent(generation=generation)[name] == [float(np.float32(value))]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize(
    ("given_words", "expected"),
    [
        ("19", ("19",)),
        (["19"], ("19",)),
        (("a", "b c"), ("a", "b c")),
        ([np.str_("x")], ("x",)),
        ("größe", ("größe",)),
        ([], ()),
        ((), ()),
        (None, ()),
    ],
)
def test_words_are_one_str_or_a_list_of_them(name, given_words, expected) -> None:
    generation = Generation(**{name: given_words})
    assert getattr(generation, name) == expected
    assert sent(generation=generation).get(name, []) == [word.encode() for word in expected]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize(
    "value",
    [
        "",
        [""],
        ["a", ""],
        b"19",
        [b"19"],
        19,
        [19],
        [None],
        [["a"]],
        {"a"},
        {"a": 1},
        iter("ab"),
        "\ud800",
        ["a\udce9"],
    ],
    ids=lambda value: repr(value).partition(" object at ")[0],
)
def test_what_is_no_word_is_refused_by_name(name, value) -> None:
    with pytest.raises(NvlmError, match=rf"{name}.* (is empty|expected a str|not valid UTF-8)"):
        Generation(**{name: value})


def test_equal_choices_are_equal_however_they_are_written() -> None:
    assert Generation(stop_words="a", max_tokens=np.int64(3)) == Generation(max_tokens=3, stop_words=["a"])
    assert hash(Generation(stop_words=["a"])) == hash(Generation(stop_words=("a",)))


def test_an_unknown_option_is_pythons_error() -> None:
    with pytest.raises(TypeError, match="max_new_tokens"):
        Generation(max_new_tokens=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [{"max_tokens": 3}, 3, "greedy", Generation], ids=repr)
def test_generation_is_a_generation(client, value) -> None:
    with pytest.raises(NvlmError, match=r"^generation is .*expected a Generation"):
        client.ask("go", (), value)


@pytest.mark.parametrize("question", [None, 3, b"why?", ["why?"], Path("why")], ids=repr)
def test_a_question_is_a_str(client, triton, question) -> None:
    with pytest.raises(NvlmError, match=rf"^the question is .*\({type(question).__name__}\), expected a str"):
        client.ask(question)
    assert not triton.requests


@pytest.mark.parametrize("question", [b"caf\xe9".decode(errors="surrogateescape"), "x" * 9999 + "\ud83d" + "y" * 9999])
def test_bytes_that_are_no_text_are_refused_where_they_are(client, question) -> None:
    with pytest.raises(NvlmError, match=r"^the question is not valid UTF-8 at character (4|10000)") as refused:
        client.ask(question)
    assert len(refused.value.message) < 200


@given(st.text())
def test_any_text_arrives(question) -> None:
    assert sent(question)["text_input"] == [question.encode()]


def test_more_than_a_message_holds_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(wire, "MOST_REQUEST_BYTES", 1000)
    with pytest.raises(NvlmError, match="the request has 1,005 bytes, at most 1,000"):
        sent("x" * 1001)


def test_an_image_file_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "any.png").write_bytes(b"\x89PNG, not really")
    assert image_bytes(tmp_path / "any.png") == b"\x89PNG, not really"


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NvlmError, match=r"nothing\.png does not exist"):
        image_bytes(tmp_path / "nothing.png")


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(NvlmError, match="is a folder"):
        image_bytes(tmp_path)


def test_an_unreadable_image_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.png").write_bytes(b"")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(NvlmError, match=r"secret\.png cannot be read: Permission denied"):
        image_bytes(tmp_path / "secret.png")
