"""The released model by its built-in spec, and profiles made from shipped ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nvlm_deploy.planning.known_models import PlannedModel, planned_model
from nvlm_deploy.profile import Profile, load_profile


@pytest.fixture(scope="session")
def released() -> PlannedModel:
    return planned_model(spec_name="nvlm-d-72b")


@pytest.fixture(scope="session")
def profile_with() -> Callable[..., Profile]:
    """A shipped profile with other choices: `decoder_`, `vision_`, `calibration_` and `serving_` name their section."""

    def make(name: str = "h100-sxm-80gb-throughput", **changes: Any) -> Profile:
        profile = load_profile(name)
        for key, value in changes.items():
            section, _, field = key.partition("_")
            if section in ("decoder", "vision", "calibration", "serving"):
                changed = getattr(profile, section).model_copy(update={field: value})
                profile = profile.model_copy(update={section: changed})
            else:
                profile = profile.model_copy(update={key: value})
        return profile

    return make
