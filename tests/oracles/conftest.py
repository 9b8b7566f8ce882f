"""What the oracles' tests share lies beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from oracle_answers import HELDOUT, TEXTS, image_samples

from nvlm_deploy.samples import Sample, read_samples


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Held-out questions about pictures of many sizes, then some without a picture."""
    texts = [sample for sample in read_samples(HELDOUT) if not sample.images][:TEXTS]
    return [*image_samples(tmp_path_factory.mktemp("images")), *texts]
