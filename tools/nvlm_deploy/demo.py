"""The whole road on a machine without a GPU: build both profiles, serve each, measure, and show one answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nvlm_deploy.bench.latency import measure_latencies
from nvlm_deploy.client import Generation, NvlmClient
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.pipeline import State, Step
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.report.progress import progress
from nvlm_deploy.report.statistics import Latency
from nvlm_deploy.report.tables import ModelResult
from nvlm_deploy.samples import Sample, read_samples
from nvlm_deploy.steps.order import pipeline_of
from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer
from nvlm_deploy.validate.accuracy import Questions, comparison_as_json
from nvlm_deploy.validate.tasks import Comparison, Scored, accuracy_by_task

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


@dataclass(frozen=True)
class DemoResult:
    """Both models, and what the FP8 one said about the bundled picture."""

    reference: ServedModel
    fp8: ServedModel
    example: Scored

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.reference.answers, self.fp8.answers)

    @property
    def models(self) -> list[ModelResult]:
        return [self.reference.result, self.fp8.result]

    def as_json(self) -> dict[str, Any]:
        sample = self.example.sample
        return {
            "models": [model.as_json() for model in self.models],
            **comparison_as_json(self.comparison),
            "example": {
                "image": sample.images[0].name,
                "question": sample.question,
                "answer": self.example.text,
                "right_answer": sample.answer,
                "is_right": self.example.is_right,
            },
        }


class Listener(Protocol):
    """Hears of the demo while it runs."""

    def on_step(self, profile: str, step: Step, state: State) -> None:
        """A build step has ended."""
        ...

    def on_example(self, sample: Sample) -> None:
        """The FP8 model is asked about the bundled picture now."""
        ...

    def on_piece(self, piece: str) -> None:
        """The next piece of its answer."""
        ...

    def on_example_end(self) -> None:
        """Nothing more comes."""
        ...


def run_demo(assets: Assets, workspace: Path, listener: Listener, sizes: Sizes = DEFAULT_SIZES) -> DemoResult:
    """Build, serve and measure both profiles; what is built and up to date in `workspace` is kept.

    The FP8 model's answer about the example comes last. Raises NvlmError and MachineError as the parts do.
    """
    samples, example = read_samples(assets.held_out, limit=sizes.questions), assets.example()
    recipes = [Recipe(assets.model, load_profile(name), workspace, assets.calibration) for name in TITLES]
    for recipe in recipes:
        for step, state in pipeline_of(recipe).run():
            listener.on_step(recipe.profile.name, step, state)
    with contextlib.ExitStack() as servers:
        urls = list(_started(recipes, servers))
        reference, fp8 = _measured(urls, samples, sizes.latency_requests)
        answer = _streamed(urls[1], example, listener)
    return DemoResult(reference, fp8, answer)


def _started(recipes: Sequence[Recipe], servers: contextlib.ExitStack) -> Iterator[str]:
    """The address of each recipe's server."""
    with progress("starting Triton servers", len(recipes)) as advance:
        for recipe in recipes:
            server = TritonServer(recipe.repository, ServerChoices(ports=Ports.free(), ready_timeout_s=300))
            yield servers.enter_context(server).grpc_url
            advance()


def _measured(urls: Sequence[str], samples: Sequence[Sample], requests: int) -> list[ServedModel]:
    """Accuracy of one server after the other; latency of all by turns, so that a busy machine slows all alike."""
    questions = Questions(samples, MAX_TOKENS)
    answers = [questions.to_server(url, title) for url, title in zip(urls, TITLES.values(), strict=True)]
    image = _latencies(urls, [sample for sample in samples if sample.images][:requests], "image")
    text = _latencies(urls, [sample for sample in samples if not sample.images][:requests], "text-only")
    return [
        ServedModel(ModelResult(title, accuracy_by_task(found), {"image": with_image, "text-only": without}), found)
        for title, found, with_image, without in zip(TITLES.values(), answers, image, text, strict=True)
    ]


def _latencies(urls: Sequence[str], samples: Sequence[Sample], kind: str) -> list[Latency]:
    with progress(f"timing {kind} questions", len(samples)) as advance:
        return measure_latencies(urls, samples, max_tokens=MAX_TOKENS, on_sample=advance)


def _streamed(url: str, sample: Sample, listener: Listener) -> Scored:
    listener.on_example(sample)
    with NvlmClient(url) as client:
        stream = client.ask(sample.question, sample.images, Generation(max_tokens=MAX_TOKENS))
        for piece in stream:
            listener.on_piece(piece)
        listener.on_example_end()
        return Scored(sample, stream.answer().text)
