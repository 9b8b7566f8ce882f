"""A calibration list judged before hours are spent on it: what a server would refuse is no sample of its work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import Size
from nvlm_deploy.image_file.opening import judged_size, open_image, shown_size, structure_of
from nvlm_deploy.image_file.reading import ImageReading
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import IM_END, VISION_PAD, ModelSpec
from nvlm_deploy.model.tiling import tile_count
from nvlm_deploy.profile import Profile
from nvlm_deploy.sample_embeddings import of_picture
from nvlm_deploy.samples import TAKE_OUT, PlacedSample, Sample, blamed_on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedPrompts:
    """What the profile's server takes: the longest prompt with its answer, and the most images."""

    prompts: PromptBuilder
    spec: ModelSpec
    profile: Profile

    def require(self, samples: Sequence[PlacedSample]) -> None:
        """Raises NvlmError naming the line of a sample that would be refused, or whose picture is none.

        Of a picture the header alone is read.
        """
        for place, sample in samples:
            with blamed_on(place):
                self._require_images(sample)
                self._require_length(sample)

    def _require_images(self, sample: Sample) -> None:
        most = self.profile.serving.max_images
        if len(sample.images) > most:
            raise NvlmError(
                f"{len(sample.images)} images, profile {self.profile.name!r} serves at most {most} a request",
                hint=f"{TAKE_OUT}, or raise serving.max_images",
            )

    def _require_length(self, sample: Sample) -> None:
        reading = self.profile.serving.image_reading
        sizes = [of_picture(path, lambda encoded: _shown_size(encoded, reading)) for path in sample.images]
        reading.limits.require_request(sizes)
        tiles = [tile_count(*size, self.spec.tiling) for size in sizes]
        answer = self.prompts.tokenizer.encode(sample.answer + IM_END, add_special_tokens=False).ids
        if self.prompts.pad_token_id in answer:
            raise NvlmError(f"the answer contains the reserved token {VISION_PAD}")
        tokens, most = len(self.prompts.ids(sample.question, tiles)) + len(answer), self.profile.decoder.max_seq_len
        if tokens > most:
            raise NvlmError(
                f"{tokens:,} tokens with the answer, profile {self.profile.name!r} serves at most {most:,}",
                hint=f"{TAKE_OUT}, or raise decoder.max_seq_len (the model has {self.spec.decoder.max_positions:,} "
                "positions)",
            )


def _shown_size(encoded: bytes, reading: ImageReading) -> Size:
    judged_size(encoded, reading.limits)
    return shown_size(structure_of(encoded), reading)


def require_whole_pictures(samples: Sequence[PlacedSample], reading: ImageReading) -> None:
    """Decodes every picture once, which takes seconds where encoding takes hours. Raises NvlmError naming its line."""
    seen: set[Path] = set()
    for place, sample in samples:
        with blamed_on(place):
            for path in set(sample.images) - seen:
                of_picture(path, lambda encoded: open_image(encoded, reading))
        seen |= set(sample.images)


def warn_of_too_few(samples: Sequence[PlacedSample], profile: Profile) -> None:
    """Where the list is shorter than the profile asks: scales see less than they should, and the manifest says so."""
    asked = profile.calibration.samples
    if len(samples) < asked:
        log.warning(
            "%s is the last of %d samples, profile %r asks for %d: scales will see less than was meant; add samples, "
            "or set calibration.samples = %d",
            samples[-1].place,
            len(samples),
            profile.name,
            asked,
            len(samples),
        )
