"""What the clients send: KServe's own reading of it must give the values back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from nvlm_deploy import tensors
from nvlm_deploy.client.request import Generation, image_bytes, input_tensors
from nvlm_deploy.client.wire import infer_request
from nvlm_deploy.errors import NvlmError

DEFAULTS = Generation()


def sent(question: str = "why?", images=(), generation: Generation = DEFAULTS) -> dict[str, list]:
    """The request's tensors, read back with NVIDIA's own functions."""
    request = service_pb2.ModelInferRequest.FromString(
        infer_request(input_tensors(question, images, generation)).SerializeToString()
    )
    values = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values[tensor.name] = deserialize_bytes_tensor(raw).tolist()
        else:
            dtype = {"BOOL": "bool", "FP32": "float32"}.get(tensor.datatype, tensor.datatype.lower())
            values[tensor.name] = np.frombuffer(raw, dtype).tolist()
        assert list(tensor.shape) == [len(values[tensor.name])]
    return values


def test_a_bare_question_sends_nothing_but_itself_and_asks_for_a_stream() -> None:
    assert sent("wie groß?") == {"text_input": ["wie groß?".encode()], "stream": [True]}


def test_everything_that_is_given_arrives() -> None:
    generation = Generation(7, 0.5, 3, 0.25, 1.5, 2**64 - 1, ("a", "b\n"))
    values = sent("q", [b"one", b"second"], generation)
    assert values["image"] == [b"one", b"second"]
    assert values["stop_words"] == [b"a", b"b\n"]
    numbers = [
        values[name][0] for name in ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    ]
    assert numbers == [7, 0.5, 3, 0.25, 1.5, 2**64 - 1]


def test_only_inputs_of_the_ensemble_are_sent() -> None:
    values = sent("q", [b"x"], Generation(1, 1.0, 1, 1.0, 1.0, 1, ("x",)))
    assert values.keys() == {spec.name for spec in tensors.REQUEST_INPUTS}


def test_every_request_has_an_id_of_its_own() -> None:
    ids = {infer_request(input_tensors("q", [], Generation())).id for _ in range(100)}
    assert len(ids) == 100 and "" not in ids


def test_the_server_is_asked_to_say_the_end() -> None:
    request = infer_request(input_tensors("q", [], Generation()))
    assert request.parameters["triton_enable_empty_final_response"].bool_param


@pytest.mark.parametrize(
    "generation",
    [Generation(seed=-1), Generation(seed=2**64), Generation(max_tokens=10**10), Generation(top_k=-(2**31) - 1)],
)
def test_a_number_that_its_tensor_cannot_hold_is_refused_before_it_is_sent(generation: Generation) -> None:
    with pytest.raises(NvlmError, match=r"(seed|max_tokens|top_k) is .*, expected"):
        sent(generation=generation)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(NvlmError, match="not valid UTF-8"):
        sent(b"caf\xe9".decode(errors="surrogateescape"))


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
