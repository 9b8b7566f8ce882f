"""A small workspace, built by the real pipeline: a fake plan and a fake decoder, and a repository of the two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from nvlm_deploy.fingerprint import Fingerprint
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.pipeline import Pipeline, Step
from nvlm_deploy.profile import Profile
from nvlm_deploy.triton.choices import ServingChoices
from nvlm_deploy.triton.repository import RepositorySources, write_repository

SAMPLES = '{"question": "?", "answer": "!", "images": ["000.jpg"]}\n'


def noise(text: str, size: int = 5000) -> bytes:
    return hashlib.shake_128(text.encode()).digest(size)


def write_calibration(folder: Path) -> Path:
    folder.mkdir()
    (folder / "samples.jsonl").write_text(SAMPLES)
    (folder / "000.jpg").write_bytes(noise("picture"))
    return folder


class Workspace:
    """`engines/NAME/...` and `triton_repo/NAME` of a profile; `bound_to` is what its vision plan runs on."""

    def __init__(self, root: Path, profile: Profile, spec: ModelSpec, tokenizer: Path) -> None:
        self.root, self.profile, self.spec, self.tokenizer = root, profile, spec, tokenizer
        self.calibration = root.parent / "calibration"
        if not self.calibration.exists():
            write_calibration(self.calibration)

    @property
    def engines(self) -> Path:
        return self.root / "engines" / self.profile.name

    @property
    def repository(self) -> Path:
        return self.root / "triton_repo" / self.profile.name

    def build(self, bound_to: Fingerprint | None = None) -> None:
        makers = {
            "build-vision": lambda: self._vision(bound_to),
            "quantize-llm": self._decoder,
            "assemble": self._assemble,
        }
        list(Pipeline(self.root / ".lock", makers, profile=self.profile.model_dump(mode="json")).run())

    def _vision(self, bound_to: Fingerprint | None) -> Step:
        files = {"vision.plan": noise("plan")} if bound_to else {"vision.onnx": noise("onnx")}
        inputs = {f"calibration {path.name}": path for path in sorted(self.calibration.iterdir())}
        return Step(
            "build-vision", self.engines / "vision-engine", inputs, {}, _writer(files), bound_to=lambda: bound_to
        )

    def _decoder(self) -> Step:
        files = {"config.json": b"{}\n", "rank0.safetensors": noise("rank")}
        return Step("quantize-llm", self.engines / "decoder", {}, {}, _writer(files))

    def _assemble(self) -> Step:
        vision, decoder = self.engines / "vision-engine", self.engines / "decoder"

        def make(folder: Path) -> Mapping[str, object]:
            write_repository(folder, RepositorySources(vision, decoder, self.tokenizer, self.spec), ServingChoices())
            return {}

        inputs = {"vision": vision, "decoder": decoder, "tokenizer.json": self.tokenizer}
        return Step("assemble", self.repository, inputs, {"profile": self.profile.name}, make)


def _writer(files: Mapping[str, bytes]):
    def make(folder: Path) -> Mapping[str, object]:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return {}

    return make


def flip(path: Path, place: int = 0, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)
