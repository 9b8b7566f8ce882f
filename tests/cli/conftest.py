"""The small model built once, for the verbs that serve, verify and ask."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def built_workspace(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with all that `nvlm build --profile cpu` makes of the small model. Do not write to it."""
    from nvlm_deploy.profile import load_profile
    from nvlm_deploy.recipe import Recipe
    from nvlm_deploy.steps.order import pipeline_of

    workspace = tmp_path_factory.mktemp("built")
    recipe = Recipe(tiny_folder, load_profile("cpu"), workspace, tiny_folder.parent / "calibration")
    list(pipeline_of(recipe).run())
    return workspace


@pytest.fixture(scope="session")
def built_repository(built_workspace: Path) -> Path:
    """Its Triton repository. Do not write to it."""
    return built_workspace / "triton_repo" / "cpu"
