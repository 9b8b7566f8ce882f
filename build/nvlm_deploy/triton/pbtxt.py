"""`config.pbtxt` as data: frozen dataclasses, rendered and parsed through Triton's own protobuf.

No text templates: an unfilled `${...}` cannot be written because nothing is ever filled in, and what is written is
parsed back and compared before anybody relies on it (facts/pains-and-anchors.md, pain 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.tensors import TensorSpec


@dataclass(frozen=True)
class TensorConfig:
    """One input or output of a Triton model; `dims` leave out the batch dimension where the model batches.

    `reshape` is the form in which the backend gets it: () takes the axis of a single value away.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False
    reshape: tuple[int, ...] | None = None

    @classmethod
    def from_spec(cls, spec: TensorSpec, *, batched: bool = False, ragged: bool = False) -> TensorConfig:
        """The config of a border tensor; with `batched` its first axis is the batch and is left out."""
        dims = tuple(spec.triton_dims)[1:] if batched else tuple(spec.triton_dims)
        return cls(spec.name, spec.triton_type, dims, spec.optional, ragged)

    def reshaped(self, shape: tuple[int, ...]) -> TensorConfig:
        """The same tensor, given to the backend in another form."""
        return replace(self, reshape=shape)


@dataclass(frozen=True)
class EnsembleStep:
    """One composing model; the maps go from its tensor names to the ensemble's, sorted by key."""

    model: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DynamicBatching:
    """Triton's dynamic batcher with a bounded queue (0 = unbounded) and the batch sizes it waits for."""

    max_queue_delay_us: int = 0
    max_queue_size: int = 0
    preferred: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A complete Triton model configuration: nothing in it is left to auto-complete.

    `left_empty` are parameters that the backend insists on finding, and that are to say nothing.
    """

    name: str
    backend: str
    max_batch_size: int
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    parameters: tuple[tuple[str, str], ...] = ()
    steps: tuple[EnsembleStep, ...] = ()
    instances: int = 1
    decoupled: bool = False
    batching: DynamicBatching | None = None
    left_empty: tuple[str, ...] = ()

    @property
    def is_ensemble(self) -> bool:
        """An ensemble has a platform, steps and neither backend nor instances."""
        return bool(self.steps)

    def tensor(self, name: str) -> TensorConfig | None:
        """The input or output called `name`."""
        return next((tensor for tensor in (*self.inputs, *self.outputs) if tensor.name == name), None)

    def parameter(self, key: str) -> str | None:
        """The string value of parameter `key`."""
        return dict(self.parameters).get(key)


def text_parameters(parameters: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """As a ModelConfig holds them: sorted; switches in small letters, as Triton's own files write them."""
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in parameters.items()}
    return tuple(sorted(texts.items()))


def config_text(config: ModelConfig) -> str:
    """The text of `config.pbtxt`, proved by parsing it back into an equal ModelConfig.

    Raises NvlmError for a parameter that holds no final value and when the round trip changes anything.
    """
    from google.protobuf import text_format

    _refuse_unresolved(config)
    text = str(text_format.MessageToString(_message_from(config)))
    if config_from_text(text, origin=config.name) != config:
        raise NvlmError(f"{config.name}: config.pbtxt does not survive its own round trip through the protobuf")
    return text


def config_from_text(text: str, *, origin: str) -> ModelConfig:
    """Parse `config.pbtxt`; NvlmError names `origin` and the protobuf's complaint."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        message = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise NvlmError(f"{origin}: not a valid config.pbtxt: {error}") from error
    return _config_from(message)


def _refuse_unresolved(config: ModelConfig) -> None:
    for key, value in config.parameters:
        if not value or "${" in value or value == "None":
            raise NvlmError(f"{config.name}: parameter {key} has no final value (found {value!r})")


def _message_from(config: ModelConfig) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    message = pb.ModelConfig(name=config.name, max_batch_size=config.max_batch_size)
    message.input.extend(_tensor_message(pb.ModelInput(), tensor, is_input=True) for tensor in config.inputs)
    message.output.extend(_tensor_message(pb.ModelOutput(), tensor, is_input=False) for tensor in config.outputs)
    for key, value in config.parameters:
        message.parameters[key].string_value = value
    for key in config.left_empty:
        message.parameters[key].string_value = ""
    if config.is_ensemble:
        message.platform = "ensemble"
        message.ensemble_scheduling.step.extend(_step_message(pb, step) for step in config.steps)
    else:
        message.backend = config.backend
        message.instance_group.add(count=config.instances, kind=pb.ModelInstanceGroup.KIND_CPU)
        message.model_transaction_policy.decoupled = config.decoupled
    if config.batching is not None:
        message.dynamic_batching.preferred_batch_size.extend(config.batching.preferred)
        message.dynamic_batching.max_queue_delay_microseconds = config.batching.max_queue_delay_us
        message.dynamic_batching.default_queue_policy.max_queue_size = config.batching.max_queue_size
    return message


def _tensor_message(message: Any, tensor: TensorConfig, *, is_input: bool) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    message.name = tensor.name
    message.data_type = pb.DataType.Value(tensor.data_type)
    message.dims.extend(tensor.dims)
    if is_input:
        message.optional = tensor.optional
        message.allow_ragged_batch = tensor.ragged
    if tensor.reshape is not None:
        message.reshape.SetInParent()
        message.reshape.shape.extend(tensor.reshape)
    return message


def _step_message(pb: Any, step: EnsembleStep) -> Any:
    message = pb.ModelEnsembling.Step(model_name=step.model, model_version=-1)
    message.input_map.update(dict(step.inputs))
    message.output_map.update(dict(step.outputs))
    return message


def _config_from(message: Any) -> ModelConfig:
    groups = list(message.instance_group)
    parameters = {key: value.string_value for key, value in message.parameters.items()}
    return ModelConfig(
        name=message.name,
        backend=message.backend,
        max_batch_size=message.max_batch_size,
        inputs=_tensors_from(message.input),
        outputs=_tensors_from(message.output),
        parameters=tuple(sorted((key, value) for key, value in parameters.items() if value)),
        steps=tuple(_step_from(step) for step in message.ensemble_scheduling.step),
        instances=groups[0].count if groups else 1,
        decoupled=message.model_transaction_policy.decoupled,
        batching=_batching_from(message),
        left_empty=tuple(sorted(key for key, value in parameters.items() if not value)),
    )


def _tensors_from(messages: Iterable[Any]) -> tuple[TensorConfig, ...]:
    from tritonclient.grpc import model_config_pb2 as pb

    return tuple(
        TensorConfig(
            name=message.name,
            data_type=pb.DataType.Name(message.data_type),
            dims=tuple(message.dims),
            optional=getattr(message, "optional", False),
            ragged=getattr(message, "allow_ragged_batch", False),
            reshape=tuple(message.reshape.shape) if message.HasField("reshape") else None,
        )
        for message in messages
    )


def _step_from(message: Any) -> EnsembleStep:
    inputs = tuple(sorted(message.input_map.items()))
    outputs = tuple(sorted(message.output_map.items()))
    return EnsembleStep(message.model_name, inputs, outputs)


def _batching_from(message: Any) -> DynamicBatching | None:
    if not message.HasField("dynamic_batching"):
        return None
    policy = message.dynamic_batching
    size = policy.default_queue_policy.max_queue_size
    return DynamicBatching(policy.max_queue_delay_microseconds, size, tuple(policy.preferred_batch_size))
