"""Cross-check of an ensemble: every mapped tensor exists on both sides, agrees, and is made exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.triton.pbtxt import EnsembleStep, ModelConfig, TensorConfig


@dataclass(frozen=True)
class _End:
    """One end of a wire: a tensor of a model, and whether the model's batch axis comes before its dims."""

    place: str
    tensor: TensorConfig
    is_batched: bool

    @property
    def full_dims(self) -> tuple[int, ...]:
        return (-1, *self.tensor.dims) if self.is_batched else self.tensor.dims


def require_wired(configs: Sequence[ModelConfig]) -> None:
    """Raises NvlmError naming every fault of the ensembles among `configs`."""
    models = {config.name: config for config in configs}
    faults = [fault for config in configs if config.is_ensemble for fault in _faults(config, models)]
    if faults:
        raise NvlmError("the ensemble is not wired right:\n  " + "\n  ".join(faults))


def _faults(ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    missing = [step.model for step in ensemble.steps if step.model not in models]
    if missing:
        yield from (f"{ensemble.name}: there is no model {name}" for name in missing)
        return
    made, wires = _producers(ensemble, models), list(_consumers(ensemble, models))
    yield from _unknown_tensors(ensemble, models)
    yield from _unmapped_inputs(ensemble, models)
    for name, ends in made.items():
        if len(ends) > 1:
            yield f"ensemble tensor {name} is made more than once: {', '.join(end.place for end in ends)}"
    for name, consumer in wires:
        if name not in made:
            yield f"{consumer.place} reads ensemble tensor {name}, which nothing makes"
        for producer in made.get(name, []):
            yield from _disagreements(producer, consumer)


def _producers(ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> dict[str, list[_End]]:
    made = {tensor.name: [_End(f"{ensemble.name} input {tensor.name}", tensor, False)] for tensor in ensemble.inputs}
    for step in ensemble.steps:
        for inner, name in step.outputs:
            made.setdefault(name, []).extend(_ends(step, models, inner, "output"))
    return made


def _consumers(ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[tuple[str, _End]]:
    for step in ensemble.steps:
        for inner, name in step.inputs:
            yield from ((name, end) for end in _ends(step, models, inner, "input"))
    for tensor in ensemble.outputs:
        yield tensor.name, _End(f"{ensemble.name} output {tensor.name}", tensor, False)


def _ends(step: EnsembleStep, models: Mapping[str, ModelConfig], inner: str, side: str) -> Iterator[_End]:
    model = models[step.model]
    tensors = model.inputs if side == "input" else model.outputs
    for tensor in tensors:
        if tensor.name == inner:
            yield _End(f"{step.model} {side} {inner}", tensor, model.max_batch_size > 0)


def _unknown_tensors(ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    for step in ensemble.steps:
        for side, pairs in (("input", step.inputs), ("output", step.outputs)):
            for inner, _ in pairs:
                if not list(_ends(step, models, inner, side)):
                    yield f"{step.model} has no {side} {inner}"


def _unmapped_inputs(ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    for step in ensemble.steps:
        mapped = {inner for inner, _ in step.inputs}
        for tensor in models[step.model].inputs:
            if not tensor.optional and tensor.name not in mapped:
                yield f"{step.model} input {tensor.name} is required and not mapped"


def _disagreements(producer: _End, consumer: _End) -> Iterator[str]:
    made, read = producer.tensor, consumer.tensor
    if made.data_type != read.data_type:
        yield f"{producer.place} is {made.data_type}, {consumer.place} is {read.data_type}"
    if not _compatible(producer.full_dims, consumer.full_dims):
        yield f"{producer.place} has dims {list(producer.full_dims)}, {consumer.place} {list(consumer.full_dims)}"
    if made.optional and not read.optional:
        yield f"{producer.place} may be left out, {consumer.place} is required"


def _compatible(made: Sequence[int], read: Sequence[int]) -> bool:
    return len(made) == len(read) and all(-1 in pair or pair[0] == pair[1] for pair in zip(made, read, strict=True))
