"""Every input of the C++ backend is honoured, harmless or refused by the reference decoder; none is overlooked."""

from __future__ import annotations

from nvlm_deploy import tensors
from nvlm_deploy.serving import decoder


def test_the_reference_decoder_knows_its_inputs_by_the_backends_names() -> None:
    groups = [decoder._HONOURED, decoder._WITHOUT_EFFECT, decoder._ONLY_VALUE.keys()]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert set(names) <= {spec.name for spec in (*tensors.DECODER_INPUTS, tensors.STOP_TEXTS)}


def test_all_that_preprocessing_makes_is_accepted() -> None:
    made = {spec.name for spec in (*tensors.PREPARED_FOR_DECODER, *tensors.PROMPT_TABLE)}
    assert made <= {*decoder._HONOURED, *decoder._WITHOUT_EFFECT}
