"""The numerics gate: healthy graphs of every precision pass it, and what it says of one that does not is usable."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError, RejectedError
from nvlm_deploy.model.spec import spec_from_checkpoint
from nvlm_deploy.model.vision import vision_tower_from_checkpoint
from nvlm_deploy.vision.lowering import write_lowered
from nvlm_deploy.vision.numerics import subgraph
from nvlm_deploy.vision.numerics.check import check_numerics, require_numerics
from nvlm_deploy.vision.numerics.compare import difference, noise_tiles
from nvlm_deploy.vision.numerics.engine_check import require_engine
from nvlm_deploy.vision.numerics.operations import parameters_of
from nvlm_deploy.vision.numerics.reference import StageReference
from nvlm_deploy.vision.stages import states_by_stage

pytestmark = pytest.mark.slow

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
    # of four stages the operations, two runs of its own states, and of three the probes: norms, then the others
    assert len(sizes) == 4 + 4 * 2 + 3 * 2
    assert max(sizes) < path.with_name("vision.onnx.data").stat().st_size / 2


def renamed(*names: str):
    """These values under other names, as optimisers leave them."""

    def edit(graph) -> None:
        for node in graph.node:
            for side in (node.input, node.output):
                side[:] = [f"foreign/{name}" if name in names else name for name in side]
        del graph.value_info[:]

    return edit


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["block.0"], "block 0: MLP residual: the graph has no value named block.0: what computes it is not judged"),
        (["block.1.fc1", "block.1.gelu"], "block 1: fc1: the graph has no value named block.1.fc1 and 1 more"),
    ],
    ids=["between stages", "inside of a stage"],
)
def test_a_graph_that_has_lost_names_does_not_pass(short_checkpoint, export_vision, tmp_path, names, words):
    path = edited(export_vision(short_checkpoint, "bf16"), tmp_path, renamed(*names))
    report = check(path, short_checkpoint)
    assert report.sentence.startswith(words)
    assert report.end.cosine > 0.999
    with pytest.raises(RejectedError, match=f"no value named {names[0]}"):
        require_numerics(path, short_checkpoint, spec_from_checkpoint(short_checkpoint), TILES, threads=1)


def test_a_wrong_graph_without_names_fails_at_its_end_as_well(short_checkpoint, export_vision, tmp_path):
    def spoil(graph) -> None:
        for node in graph.node:
            node.input[:] = ["block.1.fc2" if name == "block.1" else name for name in node.input]
        renamed("block.1")(graph)

    report = check(edited(export_vision(short_checkpoint, "fp32"), tmp_path, spoil), short_checkpoint)
    assert [stage.name for stage in report.stages] == ["embeddings"]
    assert "embeddings: cosine" in "; ".join(map(str, report.findings))


def test_a_stage_that_is_bypassed_is_told_by_the_wiring(short_checkpoint, export_vision, tmp_path):
    def bypass(graph) -> None:
        for node in graph.node:
            if not any(name.startswith("block.0") for name in node.output):
                node.input[:] = ["patch_embedding" if name == "block.0" else name for name in node.input]

    report = check(edited(export_vision(short_checkpoint, "fp32"), tmp_path, bypass), short_checkpoint)
    assert "the stages: it cannot be bisected: block.1 reads patch_embedding, not block.0" in report.sentence


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


def test_operations_may_be_compared_on_fewer_tiles_than_the_end(short_checkpoint, export_vision):
    report = check(export_vision(short_checkpoint, "bf16"), short_checkpoint, noise_tiles(11, 56), bisected=2)
    assert (report.passed, report.tiles, len(report.end.cosines)) == (True, 2, 11)
    assert "on 11 tiles" in report.sentence
    assert {len(operation.judged.difference.cosines) for stage in report.stages for operation in stage.operations} == {
        2
    }


# --- what is served


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_lowered_graph_can_be_judged_as_the_graph_it_was_made_of(
    short_checkpoint, export_vision, tmp_path, precision
):
    path = write_lowered(export_vision(short_checkpoint, precision), tmp_path)
    report = check(path, short_checkpoint)
    assert (report.passed, report.precision) == (True, precision), report.sentence


@pytest.fixture
def judged(short_checkpoint, export_vision, tmp_path):
    """A lowered graph and the reference's embeddings of TILES."""
    source = export_vision(short_checkpoint, "bf16")
    return write_lowered(source, tmp_path / "engine"), check(source, short_checkpoint).expected


def test_the_engine_is_judged_as_it_is_served(judged):
    path, expected = judged
    assert require_engine(path, TILES, expected, "bf16", threads=1).cosine > 0.999


def test_an_engine_of_other_weights_is_rejected(judged):
    path, expected = judged
    weights = np.fromfile(path.with_name("vision.onnx.data"), np.uint16)
    weights[len(weights) // 2 :][:5000] ^= 0x4000
    weights.tofile(path.with_name("vision.onnx.data"))
    with pytest.raises(RejectedError, match=r"vision\.onnx, whose graph passes its gate: .*(cosine|NaN)"):
        require_engine(path, TILES, expected, "bf16", threads=1)


def test_an_engine_that_does_not_run_is_rejected(judged):
    path, expected = judged
    path.with_name("vision.onnx.data").unlink()
    with pytest.raises(RejectedError, match=r"the engine vision\.onnx does not run: .*vision\.onnx\.data"):
        require_engine(path, TILES, expected, "bf16", threads=1)


# --- files


def test_a_missing_graph_is_named(short_checkpoint, tmp_path):
    with pytest.raises(NvlmError, match=r"no vision graph .*vision\.onnx"):
        check(tmp_path / "vision.onnx", short_checkpoint)


def test_a_folder_stands_for_the_graph_in_it(short_checkpoint, export_vision, tmp_path):
    assert check(export_vision(short_checkpoint, "fp32").parent, short_checkpoint).passed
    with pytest.raises(NvlmError, match=r"no vision graph .*vision\.onnx"):
        check(tmp_path, short_checkpoint)


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xff not a graph", "cannot be read"), (b"", "is empty")])
def test_a_file_that_is_no_graph_is_named(short_checkpoint, tmp_path, content, words):
    (tmp_path / "vision.onnx").write_bytes(content)
    with pytest.raises(NvlmError, match=rf"vision\.onnx {words}"):
        check(tmp_path / "vision.onnx", short_checkpoint)


def test_a_graph_without_its_data_is_told_before_anything_is_run(short_checkpoint, export_vision, tmp_path):
    source = export_vision(short_checkpoint, "bf16")
    path, data = tmp_path / "vision.onnx", tmp_path / "vision.onnx.data"
    shutil.copyfile(source, path)
    with pytest.raises(
        NvlmError, match=r"vision\.onnx\.data is missing: vision\.onnx has its weights there"
    ) as failure:
        check(path, short_checkpoint)
    assert "nvlm export-vision --force" in str(failure.value.hint)
    data.write_bytes(source.with_name(data.name).read_bytes()[:500_000])
    with pytest.raises(NvlmError, match=r"vision\.onnx\.data has 500,000 bytes, vision\.onnx needs \d,\d{3},\d{3}"):
        check(path, short_checkpoint)


def test_a_graph_of_another_model_is_refused(short_checkpoint, export_vision, tmp_path):
    def smaller(graph) -> None:
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 28

    path = edited(export_vision(short_checkpoint, "fp32"), tmp_path, smaller)
    with pytest.raises(NvlmError, match=r"takes tiles of \[28, 56, 3\], this checkpoint's are \[56, 56, 3\]"):
        check(path, short_checkpoint)
