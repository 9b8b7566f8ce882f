"""The engines behind the vision model: ONNX Runtime for real, plans as far as a machine without a GPU can tell."""

from __future__ import annotations

import ast
import inspect

import numpy as np
import pytest
import torch

from nvlm_deploy.errors import MachineError
from nvlm_deploy.serving import engine
from nvlm_deploy.serving.engine import PlanEngine, open_engine
from nvlm_deploy.vision.engine import OnnxRuntimeEngine


def test_onnx_runtime_gives_the_graphs_embeddings(exported_vision):
    tiles = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    opened = open_engine(exported_vision.parent, "onnxruntime", threads=1)
    assert opened.tile_size == 56
    assert np.array_equal(opened(tiles).numpy(), OnnxRuntimeEngine(exported_vision)(tiles))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_a_plan_on_a_machine_without_a_gpu_is_the_machines_lack(tmp_path, runtime):
    with pytest.raises(MachineError, match="needs a GPU"):
        open_engine(tmp_path, runtime, threads=1)


def test_every_call_of_the_plan_engine_exists_in_tensorrt_rtx():
    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    calls = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(engine)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self.context", "self.engine")
    }
    known = set(dir(rtx.IExecutionContext)) | set(dir(rtx.ICudaEngine))
    assert len(calls) == 5
    assert calls <= known
    assert hasattr(rtx.Runtime, "deserialize_cuda_engine")
    assert PlanEngine.__doc__ is not None
    assert "Not run" in PlanEngine.__doc__
