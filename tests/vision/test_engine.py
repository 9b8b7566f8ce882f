"""The ONNX Runtime engine: bounded memory, plain errors."""

from __future__ import annotations

import numpy as np
import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.vision.engine import TILES_PER_RUN, OnnxRuntimeEngine
from nvlm_deploy.vision.numerics.compare import noise_tiles

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(exported_vision) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(exported_vision, threads=1)


class CountingSession:
    """The engine's own session, with the size of each run noted."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.inner, self.sizes = engine._session, []

    def run(self, outputs, inputs):
        self.sizes.append(len(inputs["tiles"]))
        return self.inner.run(outputs, inputs)


def test_no_tiles_give_no_embeddings_and_no_run(engine, monkeypatch):
    session = CountingSession(engine)
    monkeypatch.setattr(engine, "_session", session)
    found = engine(np.zeros((0, 56, 56, 3), dtype=np.uint8))
    assert (found.shape, found.dtype, session.sizes) == ((0, 4, 256), np.float32, [])


@pytest.mark.parametrize("count", [1, TILES_PER_RUN, TILES_PER_RUN + 1, 3 * TILES_PER_RUN])
def test_many_tiles_are_run_in_bounded_chunks_and_each_keeps_its_place(engine, monkeypatch, count):
    session = CountingSession(engine)
    monkeypatch.setattr(engine, "_session", session)
    tiles = noise_tiles(count, 56)
    found = engine(tiles)
    assert sum(session.sizes) == count
    assert max(session.sizes) <= TILES_PER_RUN
    alone = np.concatenate([engine(tiles[index : index + 1]) for index in range(count)])
    np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "tiles",
    [
        np.zeros((1, 56, 56, 3), dtype=np.float32),
        np.zeros((1, 57, 56, 3), dtype=np.uint8),
        np.zeros((56, 56, 3), dtype=np.uint8),
        np.zeros((1, 3, 56, 56), dtype=np.uint8),
    ],
)
def test_tiles_of_another_shape_or_type_are_refused_with_what_was_expected(engine, tiles):
    with pytest.raises(NvlmError, match=r"expected uint8 \['n', 56, 56, 3\]"):
        engine(tiles)


def test_a_missing_graph_is_named(tmp_path):
    with pytest.raises(NvlmError, match=r"no vision graph .*vision\.onnx"):
        OnnxRuntimeEngine(tmp_path / "vision.onnx")


def test_a_damaged_graph_is_named(tmp_path):
    (tmp_path / "vision.onnx").write_bytes(b"not a graph")
    with pytest.raises(NvlmError, match=r"vision\.onnx cannot be loaded"):
        OnnxRuntimeEngine(tmp_path / "vision.onnx")


def test_a_graph_without_its_data_file_is_named(exported_vision, tmp_path):
    (tmp_path / "vision.onnx").write_bytes(exported_vision.read_bytes())
    with pytest.raises(NvlmError, match=r"vision\.onnx cannot be loaded"):
        OnnxRuntimeEngine(tmp_path / "vision.onnx")


def test_a_graph_of_something_else_is_refused_with_what_it_maps(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "other", sides[:1], sides[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "other.onnx"
    )
    with pytest.raises(NvlmError, match="maps x to y"):
        OnnxRuntimeEngine(tmp_path / "other.onnx")
