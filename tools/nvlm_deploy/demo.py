"""The whole road on a machine without a GPU: build both profiles, serve each, measure, and show one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nvlm_deploy.bench.latency import measure_latency
from nvlm_deploy.client import Answer, Generation, NvlmClient
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.pipeline import State, Step
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.progress import progress
from nvlm_deploy.report.statistics import Latency
from nvlm_deploy.report.tables import ModelResult
from nvlm_deploy.samples import Sample, read_samples
from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer
from nvlm_deploy.validate.accuracy import Questions, comparison_as_json
from nvlm_deploy.validate.tasks import Comparison, Scored, accuracy_by_task, is_exact

# by profile; the reference first
TITLES = {"cpu-bf16": "BF16 (unquantised)", "cpu": "FP8"}
MAX_TOKENS = 32


@dataclass(frozen=True)
class Assets:
    """The small model, questions it was never trained on, and samples for the FP8 scales."""

    model: Path
    held_out: Path
    calibration: Path

    @classmethod
    def of_checkout(cls) -> Assets:
        """Those of tests/models. Raises NvlmError when this is an installed package without its checkout."""
        models = Path(__file__).resolve().parents[2] / "tests" / "models"
        assets = cls(models / "nvlm-d-tiny", models / "heldout", models / "calibration")
        for folder in (assets.model, assets.held_out, assets.calibration):
            if not folder.is_dir():
                raise NvlmError(
                    f"no {folder}: the demo needs a checkout of the project", hint="git clone it, `make demo`"
                )
        return assets

    def example(self) -> Sample:
        """The bundled picture with a question and the right answer (tests/models/heldout.py draws it)."""
        picture = self.held_out / "example.png"
        if not picture.is_file():
            raise NvlmError(f"no {picture}", hint="git checkout it")
        return Sample(question="Read all digits in order.", answer="3 1 4 1 5 9", images=(picture,))


@dataclass(frozen=True)
class Sizes:
    """How much is asked: None is every held-out question."""

    questions: int | None = None
    latency_requests: int = 60


DEFAULT_SIZES = Sizes()


@dataclass(frozen=True)
class ServedModel:
    """What one profile answered over its server, and how fast."""

    result: ModelResult
    answers: Sequence[Scored]
    example: Answer


@dataclass(frozen=True)
class DemoResult:
    """Both models and the picture that was asked about."""

    reference: ServedModel
    fp8: ServedModel
    example: Sample

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.reference.answers, self.fp8.answers)

    @property
    def models(self) -> list[ModelResult]:
        return [self.reference.result, self.fp8.result]

    @property
    def example_is_right(self) -> bool:
        return is_exact(self.fp8.example.text, self.example.answer)

    def as_json(self) -> dict[str, Any]:
        return {
            "device": device_name(),
            "models": [model.as_json() for model in self.models],
            **comparison_as_json(self.comparison),
            "example": {
                "image": str(self.example.images[0]),
                "question": self.example.question,
                "answer": self.fp8.example.text,
                "right_answer": self.example.answer,
                "is_right": self.example_is_right,
            },
        }


class Listener(Protocol):
    """Hears of the demo while it runs."""

    def on_step(self, profile: str, step: Step, state: State) -> None:
        """A build step has ended."""
        ...

    def on_example(self, model: str, sample: Sample) -> None:
        """A model is asked about the bundled picture now."""
        ...

    def on_piece(self, piece: str) -> None:
        """The next piece of its answer."""
        ...


def run_demo(assets: Assets, workspace: Path, listener: Listener, sizes: Sizes = DEFAULT_SIZES) -> DemoResult:
    """Build, serve and measure both profiles; what is built and up to date in `workspace` is kept.

    The FP8 model's answer about the example comes last. Raises NvlmError and MachineError as the parts do.
    """
    samples, example = read_samples(assets.held_out, limit=sizes.questions), assets.example()
    recipes = [Recipe(assets.model, load_profile(name), workspace, assets.calibration) for name in TITLES]
    for recipe in recipes:
        for step, state in recipe.run():
            listener.on_step(recipe.profile.name, step, state)
    asker = _Asker(samples, example, sizes.latency_requests, listener)
    reference, fp8 = (asker.ask(recipe.repository, TITLES[recipe.profile.name]) for recipe in recipes)
    return DemoResult(reference, fp8, example)


@dataclass(frozen=True)
class _Asker:
    """Asks every model the same."""

    samples: Sequence[Sample]
    example: Sample
    latency_requests: int
    listener: Listener

    def ask(self, repository: Path, title: str) -> ServedModel:
        """Serve a repository for as long as everything is asked."""
        with TritonServer(repository, ServerChoices(ports=Ports.free())) as server:
            answers = Questions(self.samples, MAX_TOKENS).to_server(server.grpc_url)
            latency = {
                "image": self._latency(server.grpc_url, with_image=True),
                "text-only": self._latency(server.grpc_url, with_image=False),
            }
            self.listener.on_example(title, self.example)
            example = self._streamed_example(server.grpc_url)
        return ServedModel(ModelResult(title, accuracy_by_task(answers), latency), answers, example)

    def _latency(self, url: str, *, with_image: bool) -> Latency:
        chosen = [sample for sample in self.samples if bool(sample.images) is with_image][: self.latency_requests]
        with progress(f"timing {'image' if with_image else 'text-only'} questions", len(chosen)) as advance:
            return measure_latency(url, chosen, max_tokens=MAX_TOKENS, on_answer=advance)

    def _streamed_example(self, url: str) -> Answer:
        with NvlmClient(url) as client:
            stream = client.ask(self.example.question, self.example.images, Generation(max_tokens=MAX_TOKENS))
            for piece in stream:
                self.listener.on_piece(piece)
            return stream.answer()
