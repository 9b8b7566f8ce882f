"""The licence of a checkpoint is what its folder says, and NVLM-D-72B's for a model of its shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nvlm_deploy.model.licence import licence_of
from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.model.spec import spec_from_config


def test_a_model_of_the_released_shapes_has_the_released_licence(tmp_path: Path) -> None:
    assert licence_of(tmp_path, spec_from_config(NVLM_D_72B)) == "CC-BY-NC-4.0 (non-commercial), NVLM-D-72B's"


def test_a_fine_tuned_copy_with_another_context_has_it_too_beside_its_own(tmp_path: Path) -> None:
    released = spec_from_config(NVLM_D_72B)
    longer = replace(released, decoder=replace(released.decoder, max_positions=131072))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(tmp_path, longer) == "CC-BY-NC-4.0 (non-commercial), NVLM-D-72B's, mit (README.md)"


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: other\nlicense_name: tongyi\n---\n", "other (README.md), tongyi (README.md)"),
        ('---\ntags: [a]\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0 (README.md)"),
        ("license: mit\n", "not stated"),
        ("---\nlicense:\n---\n", "not stated"),
    ],
)
def test_another_model_has_what_its_card_says(tmp_path: Path, tiny_spec, card, said) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path, tiny_spec).startswith(said)
