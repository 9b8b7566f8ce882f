"""The numerics gate: healthy graphs of every precision pass it, and what it says of one that does not is usable."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.vision.numerics import subgraph
from nvlm_deploy.vision.numerics.check import check_numerics, require_numerics
from nvlm_deploy.vision.numerics.compare import difference, noise_tiles
from nvlm_deploy.vision.numerics.operations import parameters_of
from nvlm_deploy.vision.numerics.reference import StageReference
from nvlm_deploy.vision.stages import states_by_stage

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
TILES = noise_tiles(2, 56)


def check(path, checkpoint, tiles=TILES, **more):
    return check_numerics(path, checkpoint, spec_from_checkpoint(checkpoint), tiles, threads=1, **more)


def edited(path, folder, edit) -> object:
    """A copy of a graph with an edit, beside its data."""
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    shutil.copyfile(path.with_name("vision.onnx.data"), folder / "vision.onnx.data")
    onnx.save(model, folder / "vision.onnx")
    return folder / "vision.onnx"


def test_the_reference_written_for_the_gate_agrees_with_the_network_at_every_point(kept_checkpoint):
    spec = spec_from_checkpoint(kept_checkpoint)
    source = "tiles"
    for stage, module, states in states_by_stage(kept_checkpoint, spec, torch.from_numpy(TILES)):
        reference = StageReference(stage, parameters_of(stage, kept_checkpoint, spec), source, states)
        with torch.inference_mode():
            observed = stage.observed(module, states)
        assert list(observed) == list(reference.values)[1:]
        for name, expected in observed.items():
            assert difference(reference.values[name], expected).error < 1e-5, name
        source = stage.name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", ["short_checkpoint", "kept_checkpoint"])
def test_a_healthy_graph_passes_with_and_without_dummy_heads(request, export_vision, which, precision):
    checkpoint = request.getfixturevalue(which)
    report = check(export_vision(checkpoint, precision), checkpoint)
    assert (report.passed, report.precision) == (True, precision), report.sentence
    strained = max((operation for stage in report.stages for operation in stage.operations), key=lambda o: o.strain)
    print(
        f"{which} {precision}: cosine {report.end.cosine:.7f}, {strained.place} at {strained.strain:.2f} of its bound"
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_trained_model_passes_on_noise_and_on_flat_tiles(tiny_folder, export_vision, precision):
    checkpoint = Checkpoint.open(tiny_folder)
    tiles = np.concatenate([TILES, np.zeros_like(TILES[:1]), np.full_like(TILES[:1], 255)])
    report = check(export_vision(checkpoint, precision), checkpoint, tiles)
    assert report.passed, report.sentence


def test_fp8_attention_passes_too(short_checkpoint, export_vision):
    assert check(export_vision(short_checkpoint, "fp8", attention=True), short_checkpoint).passed


def test_the_accumulated_embeddings_are_those_of_torch_on_the_whole_network(short_checkpoint, export_vision):
    report = check(export_vision(short_checkpoint, "fp32"), short_checkpoint)
    tower = vision_tower_from_checkpoint(short_checkpoint, spec_from_checkpoint(short_checkpoint))
    assert tower(torch.from_numpy(TILES)).shape[0] == len(report.end.cosines) == 2
    assert report.end.cosine > 0.99999


def test_every_stage_has_a_line_in_the_order_of_computation(short_checkpoint, export_vision):
    done: list[int] = []
    report = check(export_vision(short_checkpoint, "bf16"), short_checkpoint, on_stage=lambda: done.append(1))
    names = ["pixels", "patch_embedding", "block.0", "block.1", "pixel_shuffle", "embeddings"]
    assert [stage.name for stage in report.stages] == names
    assert [len(stage.operations) for stage in report.stages] == [1, 1, 12, 12, 1, 4]
    assert len(done) == 4


def test_one_stages_weights_are_in_memory_at_a_time(short_checkpoint, export_vision, monkeypatch):
    path = export_vision(short_checkpoint, "bf16")
    sizes: list[int] = []
    run = subgraph.run_graph

    def spy(graph: bytes, *arguments, **more):
        initialisers = onnx.load_from_string(graph).graph.initializer
        lengths = (entry.value for tensor in initialisers for entry in tensor.external_data if entry.key == "length")
        sizes.append(sum(map(int, lengths)))
        return run(graph, *arguments, **more)

    monkeypatch.setattr(subgraph, "run_graph", spy)
    assert check(path, short_checkpoint).passed
    assert len(sizes) == 8  # of four stages each operation by itself, and its own states
    assert max(sizes) < path.with_name("vision.onnx.data").stat().st_size / 2


def test_a_graph_without_names_is_compared_at_its_end_and_the_report_says_so(short_checkpoint, export_vision, tmp_path):
    def rename(graph) -> None:
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name.startswith("block.0"):
                        names[index] = f"foreign/{name}"
        del graph.value_info[:]

    report = check(edited(export_vision(short_checkpoint, "bf16"), tmp_path, rename), short_checkpoint)
    assert report.passed
    assert "cannot be bisected: the graph has no value named block.0" in report.sentence
    assert [stage.name for stage in report.stages] == ["embeddings"]


def test_a_wrong_graph_without_names_fails_at_its_end(short_checkpoint, export_vision, tmp_path):
    def spoil(graph) -> None:
        for node in graph.node:
            if "block.1.norm2" in node.output:
                node.output[0] = "nameless"
            node.input[:] = ["nameless" if name == "block.1.norm2" else name for name in node.input]
            node.output[:] = ["other" if name == "block.1" else name for name in node.output]
            node.input[:] = ["block.1.fc2" if name == "block.1" else name for name in node.input]
        del graph.value_info[:]

    report = check(edited(export_vision(short_checkpoint, "fp32"), tmp_path, spoil), short_checkpoint)
    assert "embeddings: cosine" in report.sentence
    assert "cannot be bisected" in report.sentence


def test_a_stage_that_is_bypassed_is_told_by_the_wiring(short_checkpoint, export_vision, tmp_path):
    def bypass(graph) -> None:
        for node in graph.node:
            if not any(name.startswith("block.0") for name in node.output):
                node.input[:] = ["patch_embedding" if name == "block.0" else name for name in node.input]

    report = check(edited(export_vision(short_checkpoint, "fp32"), tmp_path, bypass), short_checkpoint)
    assert "block.1 reads patch_embedding, not block.0" in report.sentence


def test_an_error_that_only_grows_is_told_honestly(short_checkpoint, export_vision, monkeypatch):
    from nvlm_deploy.vision.numerics import bounds

    monkeypatch.setitem(bounds.END_COSINE, "bf16", 0.9999999)
    report = check(export_vision(short_checkpoint, "bf16"), short_checkpoint)
    assert not report.passed
    assert "every operation keeps its bound, the error grows over the stages, most in" in report.sentence


def test_the_report_is_a_document_even_with_nan_in_it(short_checkpoint, export_vision, tmp_path):
    def poison(graph) -> None:
        for tensor in graph.initializer:
            if tensor.name == "block/val_5":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32("nan"), tensor.name))

    report = check(edited(export_vision(short_checkpoint, "fp32"), tmp_path, poison), short_checkpoint)
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["passed"] is False
    assert "NaN" in document["sentence"]
    assert document["stages"][-1]["accumulated"]["cosine"] is None


def test_requiring_raises_with_the_bisections_sentence(short_checkpoint, export_vision, tmp_path):
    def tanh(graph) -> None:
        next(node for node in graph.node if "block.1.gelu" in node.output).attribute[0].s = b"tanh"

    path = edited(export_vision(short_checkpoint, "bf16"), tmp_path, tanh)
    with pytest.raises(NvlmError, match=r"fails its numerics gate: block 1: GELU in its tanh approximation"):
        require_numerics(path, short_checkpoint, spec_from_checkpoint(short_checkpoint), TILES)


def test_a_missing_graph_is_named(short_checkpoint, tmp_path):
    with pytest.raises(NvlmError, match=r"no vision graph .*vision\.onnx"):
        check(tmp_path / "vision.onnx", short_checkpoint)


def test_a_file_that_is_no_graph_is_named(short_checkpoint, tmp_path):
    (tmp_path / "vision.onnx").write_bytes(b"\xff\xff not a graph")
    with pytest.raises(NvlmError, match=r"vision\.onnx cannot be read"):
        check(tmp_path / "vision.onnx", short_checkpoint)


def test_a_graph_of_another_model_is_refused(short_checkpoint, export_vision, tmp_path):
    def smaller(graph) -> None:
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 28

    path = edited(export_vision(short_checkpoint, "fp32"), tmp_path, smaller)
    with pytest.raises(NvlmError, match=r"takes tiles of \[28, 56, 3\], this checkpoint's are \[56, 56, 3\]"):
        check(path, short_checkpoint)
