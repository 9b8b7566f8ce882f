"""Write the sample sets that lie beside the small model: `heldout/` (with `example.png`) and `calibration/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from digits import TILE, PictureMaker, Sample, samples

HELD_OUT_QUESTIONS = 800
CALIBRATION_QUESTIONS = 160  # 32 pictures with four questions each, and 32 sums
HELD_OUT_SEED, CALIBRATION_SEED, EXAMPLE_SEED = 2026, 5, 66
EXAMPLE_DIGITS = (3, 1, 4, 1, 5, 9)


def write_samples(folder: Path, found: Sequence[Sample]) -> None:
    """`samples.jsonl`, a line per question, and each picture once."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[bytes, str] = {}
    lines = []
    for sample in found:
        if sample.image is not None and sample.image not in names:
            names[sample.image] = f"{len(names):03d}.jpg"
            (folder / names[sample.image]).write_bytes(sample.image)
        images = [] if sample.image is None else [names[sample.image]]
        row = {"images": images, "question": sample.question, "answer": sample.answer, "task": sample.task}
        lines.append(json.dumps(row))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_example(path: Path) -> None:
    """Six unseen scans, 3 x 2, large enough to look at."""
    picture = PictureMaker(EXAMPLE_SEED, held_out=True).picture((3, 2), EXAMPLE_DIGITS).image
    picture.resize((3 * 2 * TILE, 2 * 2 * TILE)).quantize(64).save(path, optimize=True)


def main() -> None:
    here = Path(__file__).parent
    write_samples(here / "heldout", samples(HELD_OUT_QUESTIONS, seed=HELD_OUT_SEED))
    write_samples(here / "calibration", samples(CALIBRATION_QUESTIONS, seed=CALIBRATION_SEED, held_out=False))
    write_example(here / "heldout" / "example.png")


if __name__ == "__main__":
    main()
