"""What requests take in /dev/shm: each Python model's process has a region there for its inputs and outputs.

A region begins small (`shm-default-byte-size`), grows by what is missing (`shm-growth-byte-size`) and never shrinks.
Measured with tritonserver 2.51 and seven photos of 6 MiB: the encoded images lie in preprocessing's region, as do its
tiles; the tiles once more in the encoder's, with the embeddings; these once more in the reference decoder's. A model
takes one request at a time, but the next one's inputs come while the last one's are still there. So the regions do not
grow with the number of clients beyond two. Between requests of different sizes holes stay behind: after 40 of them
the fullest region had 1.96 times what two requests take.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_deploy.doctor.needs import BF16_BYTES, Needs
from nvlm_deploy.sku import TENSORRT_LLM

MIB = 2**20
# 1 MiB at the start, growth in whole MiB, and what keeps the books
REGION_BYTES = 3 * MIB
# a JPEG of 12 to 24 megapixels; nothing bounds the bytes of an image, only its pixels
ASSUMED_IMAGE_BYTES = 8 * MIB
_HOLES = 2


@dataclass(frozen=True)
class Region:
    """Of one model: bytes that a request brings, and bytes that the model answers with."""

    inputs: int = 0
    outputs: int = 0

    @property
    def alone(self) -> int:
        return REGION_BYTES + self.inputs + self.outputs

    @property
    def under_load(self) -> int:
        return REGION_BYTES + _HOLES * (2 * self.inputs + self.outputs)


@dataclass(frozen=True)
class RequestMemory:
    """Of requests with so many images: one alone, and any number at a time."""

    images: int
    alone_bytes: int
    under_load_bytes: int


def request_memory(needs: Needs, images: int, image_bytes: int = ASSUMED_IMAGE_BYTES) -> RequestMemory:
    """With as many tiles as the images may have and the profile's length leaves room for.

    Without a spec the tiles are not known: then it is the least.
    """
    encoded, tiles, embeddings = images * image_bytes, 0, 0
    if needs.spec is not None:
        tiling = needs.spec.tiling
        count = min(images * tiling.max_tiles_with_thumbnail, needs.visual_tokens // tiling.tokens_per_tile)
        tiles = count * tiling.tile_size**2 * 3
        embeddings = count * tiling.tokens_per_tile * needs.spec.decoder.hidden_size * BF16_BYTES
    regions = [Region(encoded, tiles), Region(tiles, embeddings), Region()]
    if needs.profile.decoder.runtime != TENSORRT_LLM:  # whose backend is no Python process
        regions.append(Region(embeddings))
    alone, under_load = sum(region.alone for region in regions), sum(region.under_load for region in regions)
    return RequestMemory(images, alone, under_load)


def largest_request(needs: Needs) -> RequestMemory:
    """With as many images as the profile allows, each of a tile at least."""
    images = needs.profile.serving.max_images
    if needs.spec is not None:
        images = min(images, needs.visual_tokens // needs.spec.tiling.tokens_per_tile)
    return request_memory(needs, images)


def what_fits(needs: Needs, free_bytes: int) -> str:
    """How many of the largest requests, in words."""
    largest = largest_request(needs)
    if free_bytes >= largest.under_load_bytes:
        return "any number at a time fits"
    if free_bytes >= largest.alone_bytes:
        return "one fits, several at a time may fail"
    fitting = [n for n in range(1, largest.images) if request_memory(needs, n).alone_bytes <= free_bytes]
    return f"none fits, one of up to {_images(fitting[-1])} does" if fitting else "none fits"


def description(needs: Needs) -> str:
    """As `the largest request, of 16 images, takes 143 MiB, several at a time 532 MiB (derived; ...)`."""
    largest = largest_request(needs)
    alone, load = (-(-size // MIB) for size in (largest.alone_bytes, largest.under_load_bytes))
    least = "" if needs.spec else "at least "
    assumed = f"(derived; {ASSUMED_IMAGE_BYTES // MIB} MiB an image assumed)"
    return (
        f"the largest request, of {_images(largest.images)}, takes {least}{alone} MiB, several at a time {load} MiB "
        f"{assumed}"
    )


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"
