"""Sample: images, a question and reference answers; read from a folder with `samples.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.places import require_file, require_folder

SAMPLES_NAME = "samples.jsonl"
TAKE_OUT = "mend its line or take it out of the list"


class Sample(BaseModel):
    """One question about zero or more images, a line of `samples.jsonl`; image paths are relative to its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    answer: str
    task: str = "all"
    images: tuple[Path, ...] = ()


class PlacedSample(NamedTuple):
    """A sample and the line that it stands in, as `FOLDER/samples.jsonl line 3`."""

    place: str
    sample: Sample


@contextmanager
def blamed_on(place: str) -> Iterator[None]:
    """An NvlmError of what stands in a line says so, and that it can be taken out."""
    try:
        yield
    except MachineError:
        raise
    except NvlmError as problem:
        raise NvlmError(f"{place}: {problem.message}", hint=problem.hint or TAKE_OUT) from problem


def read_samples(folder: Path, *, limit: int | None = None) -> list[Sample]:
    """The samples of a folder in file order, image paths made absolute.

    Raises NvlmError naming the line that cannot be read or the image that is not there.
    """
    return [sample for _, sample in read_placed_samples(folder, limit=limit)]


def read_placed_samples(folder: Path, *, limit: int | None = None) -> list[PlacedSample]:
    """As `read_samples`, each with its line."""
    require_folder(folder)
    path = folder / SAMPLES_NAME
    if not path.exists():
        raise NvlmError(f"no {SAMPLES_NAME} in {folder}", hint="one JSON object a line: question, answer, images")
    require_file(path)
    try:
        # not splitlines(): a JSON string may hold U+2028 as it is
        lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
    except UnicodeDecodeError as problem:
        raise NvlmError(f"{path} is not UTF-8: {problem}") from problem
    filled = [(number, line) for number, line in lines if line.strip()]
    if not filled[:limit]:
        raise NvlmError(f"{path} holds no samples", hint="one JSON object a line: question, answer, images")
    places = ((f"{path} line {number}", line) for number, line in filled[:limit])
    return [PlacedSample(place, _sample(folder, place, line)) for place, line in places]


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write `samples.jsonl`; image paths inside the folder become relative."""
    rows = [sample.model_dump(mode="json") for sample in samples]
    for row in rows:
        row["images"] = [Path(image).relative_to(folder).as_posix() for image in row["images"]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / SAMPLES_NAME).write_text(text, encoding="utf-8")


def _sample(folder: Path, place: str, line: str) -> Sample:
    try:
        sample = Sample.model_validate_json(line)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise NvlmError(f"{place}: {f'{key}: ' if key else ''}{first['msg']}", hint=TAKE_OUT) from None
    if not sample.question.strip():
        raise NvlmError(f"{place}: the question is empty", hint=TAKE_OUT)
    images = tuple(folder / image for image in sample.images)
    for image in images:
        if not image.is_file():
            raise NvlmError(f"{place}: no image {image}", hint=f"put it there, or {TAKE_OUT}")
    return sample.model_copy(update={"images": images})
