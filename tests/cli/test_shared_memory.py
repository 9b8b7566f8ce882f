"""What `nvlm doctor` says of /dev/shm, against the regions of a real server."""

from __future__ import annotations

import dataclasses
import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm_deploy.doctor import host
from nvlm_deploy.doctor.needs import Needs, needs_of_profile, needs_of_repository
from nvlm_deploy.doctor.shared_memory import MIB, REGION_BYTES, largest_request, request_memory, what_fits
from nvlm_deploy.profile import load_profile
from nvlm_deploy.triton.server import SHARED_MEMORY, Ports, ServerChoices, TritonServer

pytestmark = [pytest.mark.slow, pytest.mark.needs("build")]

DOCKERS_DEFAULT = 64 * MIB


@pytest.fixture(scope="module")
def needs(built_repository: Path) -> Needs:
    return needs_of_repository(built_repository)


def photo(seed: int) -> bytes:
    """A JPEG of three megapixels that compresses as badly as a sharp photo."""
    coarse = np.random.default_rng(seed).integers(0, 255, (375, 500, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((2000, 1500)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def taken(server: TritonServer) -> int:
    return sum(region.stat().st_blocks * 512 for region in SHARED_MEMORY.glob(f"{server.memory_name}*"))


@pytest.mark.slow
def test_a_real_server_takes_what_is_derived(built_repository: Path, needs: Needs) -> None:
    """One request of seven photos, then requests of all sizes at a time, then a few as large as the first."""
    from nvlm_deploy.client import Generation, NvlmClient

    photos = [photo(seed) for seed in range(7)]
    derived = request_memory(needs, 7, max(map(len, photos)))
    drawn = random.Random(0)
    mixed = [drawn.sample(photos, drawn.randint(1, 7)) for _ in range(24)]

    def ask(images: list[bytes]) -> str:
        with NvlmClient(server.grpc_url, timeout_s=240) as client:
            return client.ask("Which digits?", images, Generation(max_tokens=2)).answer().finish_reason

    with TritonServer(built_repository, ServerChoices(ports=Ports.free())) as server:
        assert ask(photos)
        alone = taken(server)
        assert derived.alone_bytes - 4 * REGION_BYTES <= alone <= derived.alone_bytes
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, [*mixed, *[photos] * 4]))
        assert alone < taken(server) <= derived.under_load_bytes


def test_dockers_default_does_not_hold_the_largest_request(needs: Needs) -> None:
    assert largest_request(needs).images == 16
    assert what_fits(needs, DOCKERS_DEFAULT) == "none fits, one of up to 6 images does"


def test_between_one_and_any_number_is_said(needs: Needs) -> None:
    largest = largest_request(needs)
    assert what_fits(needs, largest.under_load_bytes) == "any number at a time fits"
    assert what_fits(needs, largest.under_load_bytes - 1) == "one fits, several at a time may fail"
    assert what_fits(needs, largest.alone_bytes) == "one fits, several at a time may fail"
    assert what_fits(needs, largest.alone_bytes - 1).startswith("none fits, one of up to 15 images")
    assert what_fits(needs, REGION_BYTES) == "none fits"


def test_the_released_models_embeddings_count(needs: Needs) -> None:
    """Two images of seven tiles: 3,584 tokens of 8,192 BF16 values are 56 MiB, with TensorRT-LLM in one region."""
    released = needs_of_profile(load_profile("h100-sxm-80gb-throughput"), None)
    largest, tiles = largest_request(released), 14 * 448**2 * 3
    assert largest.images == 2
    assert largest.alone_bytes == 3 * REGION_BYTES + 2 * 8 * MIB + 2 * tiles + 56 * MIB
    assert largest.under_load_bytes == 3 * REGION_BYTES + 2 * (2 * 2 * 8 * MIB + 3 * tiles + 56 * MIB)
    more = dataclasses.replace(released, profile=needs.profile)
    assert request_memory(more, 1).alone_bytes > request_memory(dataclasses.replace(more, spec=None), 1).alone_bytes


def test_the_finding_is_a_no_with_a_size_that_is_enough(needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "free_bytes", lambda _folder: DOCKERS_DEFAULT)
    finding = host._shared_memory(needs)
    assert not finding.passed
    assert "64 MiB free" in finding.found
    assert "none fits" in finding.found
    assert "--shm-size=1g" in (finding.fix or "")
    monkeypatch.setattr(host, "free_bytes", lambda _folder: 1024 * MIB)
    assert host._shared_memory(needs).passed


def test_a_profile_without_a_model_counts_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "free_bytes", lambda _folder: DOCKERS_DEFAULT)
    finding = host._shared_memory(needs_of_profile(load_profile("cpu"), None))
    assert not finding.passed
    assert "at least" in finding.found
