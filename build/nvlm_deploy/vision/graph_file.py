"""A vision graph as it lies on disk: the file with its nodes, and the data file with its weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.places import require_file

if TYPE_CHECKING:
    import onnx_ir

ONNX_NAME = "vision.onnx"
DATA_NAME = "vision.onnx.data"
CALIBRATION_NAME = "calibration.json"
_AGAIN = "copy the graph and its data file once more, or export it again: `nvlm export-vision --force`"


def graph_from_file(path: Path) -> tuple[Path, onnx_ir.Model]:
    """The graph at `path`, or the `vision.onnx` in a folder; its path and what it says. No weight is read.

    Raises NvlmError when there is none, it is no ONNX, or a file that it names for its weights is missing or too short.
    """
    import onnx_ir

    file = path / ONNX_NAME if path.is_dir() else path
    require_file(file, "vision graph", hint="build it: `nvlm build`")
    if not file.stat().st_size:
        raise NvlmError(f"{file} is empty", hint=_AGAIN)
    try:
        model = onnx_ir.load(file)
    except Exception as problem:  # protobuf's DecodeError, and whatever onnx_ir meets in a foreign file
        raise NvlmError(f"{file} cannot be read: {problem}", hint=_AGAIN) from problem
    _require_data(file, model)
    return file, model


def _require_data(file: Path, model: onnx_ir.Model) -> None:
    for name, needed in _data_sizes(model).items():
        data = file.parent / name
        if not data.is_file():
            raise NvlmError(f"{data} is missing: {file.name} has its weights there", hint=_AGAIN)
        size = data.stat().st_size
        if size < needed:
            raise NvlmError(f"{data} has {size:,} bytes, {file.name} needs {needed:,}: it was cut short", hint=_AGAIN)


def _data_sizes(model: onnx_ir.Model) -> dict[str, int]:
    """By file name: where the last weight in it ends."""
    import onnx_ir

    ends: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, onnx_ir.ExternalTensor):
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            ends[str(tensor.location)] = max(end, ends.get(str(tensor.location), 0))
    return ends
