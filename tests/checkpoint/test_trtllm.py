"""The TensorRT-LLM checkpoint format: config.json, rank files, split and merge (contract section A)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm_deploy.checkpoint.stream import tensor_stream
from nvlm_deploy.checkpoint.trtllm import (
    checkpoint_writer,
    merge_tensor,
    read_checkpoint,
    split_tensor,
)
from nvlm_deploy.checkpoint.trtllm_config import config_from_layout
from nvlm_deploy.checkpoint.trtllm_layout import (
    FP8,
    FP8_PER_CHANNEL,
    Layout,
    Parallelism,
    legal_tensor_parallel,
    rank_file,
)
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import DecoderSpec

SPEC = DecoderSpec(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    layers=3,
    heads=4,
    kv_heads=2,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    max_positions=64,
)
# Qwen2-72B, NVLM-D's decoder
RELEASED = DecoderSpec(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    layers=80,
    heads=64,
    kv_heads=8,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    max_positions=32768,
)
TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


def write(folder: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """A checkpoint of numbers that are all different where the type allows; returns them without parallelism."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    values = {}
    with checkpoint_writer(folder, layout) as writer:
        for tensor in layout.tensors:
            values[tensor.name] = torch.randn(tensor.shape, generator=generator).to(TORCH[tensor.dtype])
            writer.put(tensor, values[tensor.name])
    return values


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("quant_algo", "kv_cache"), [(FP8, None), (FP8_PER_CHANNEL, FP8), (None, None), (None, FP8)])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_what_is_written_for_any_split_merges_to_what_went_in(
    tmp_path: Path, quant_algo: str | None, kv_cache: str | None, tensor: int, pipeline: int
) -> None:
    values = write(tmp_path / "decoder", Layout(SPEC, quant_algo, Parallelism(tensor, pipeline), kv_cache))
    checkpoint = read_checkpoint(tmp_path / "decoder")
    merged = checkpoint.merged()
    assert (checkpoint.spec, checkpoint.quant_algo) == (SPEC, quant_algo)
    assert checkpoint.layout.kv_cache_quant_algo == kv_cache
    assert merged.keys() == values.keys()
    assert [name for name in values if not same(merged[name], values[name])] == []


def test_rank_files_are_byte_for_byte_what_safetensors_itself_writes(tmp_path: Path) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8, Parallelism(2, 1)))
    for rank in range(2):
        ours = tmp_path / "decoder" / rank_file(rank)
        save_file(load_file(ours), tmp_path / "theirs", metadata={"format": "pt"})
        assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_rank_has_its_own_query_key_and_value_heads(tmp_path: Path) -> None:
    values = write(tmp_path / "decoder", Layout(SPEC, None, Parallelism(2)))
    fused = values["transformer.layers.0.attention.qkv.weight"]
    q, k, v = fused.split([16, 8, 8])
    held = load_file(tmp_path / "decoder" / "rank1.safetensors")["transformer.layers.0.attention.qkv.weight"]
    assert torch.equal(held, torch.cat([q[8:], k[4:], v[4:]]))


def test_more_ranks_than_key_value_heads_get_copies_of_a_head(tmp_path: Path) -> None:
    values = write(tmp_path / "decoder", Layout(SPEC, None, Parallelism(4)))
    q, k, v = values["transformer.layers.0.attention.qkv.bias"].split([16, 8, 8])
    for rank, head in enumerate([0, 0, 1, 1]):
        held = load_file(tmp_path / "decoder" / rank_file(rank))["transformer.layers.0.attention.qkv.bias"]
        rows = slice(4 * head, 4 * head + 4)
        assert torch.equal(held, torch.cat([q[4 * rank : 4 * rank + 4], k[rows], v[rows]]))


def test_the_vocabulary_is_padded_with_zeros_to_a_multiple_of_the_ranks_and_no_further(tmp_path: Path) -> None:
    values = write(tmp_path / "decoder", Layout(SPEC, None, Parallelism(4)))
    last = load_file(tmp_path / "decoder" / "rank3.safetensors")["lm_head.weight"]
    assert last.shape == (4, 16), "ceil(13 / 4) rows"
    assert torch.equal(last[:1], values["lm_head.weight"][12:])
    assert last[1:].abs().max() == 0


def test_ranks_past_the_end_of_a_tiny_vocabulary_hold_only_padding() -> None:
    tensor = Layout(SPEC).before_layers[0]
    whole = torch.arange(9 * 16.0).reshape(9, 16)
    small = type(tensor)(tensor.name, tensor.dtype, (9, 16), tensor.split)
    parts = [split_tensor(small, SPEC, whole, rank, 8) for rank in range(8)]
    assert {part.shape for part in parts} == {(2, 16)}
    assert torch.equal(merge_tensor(small, SPEC, parts), whole)


def test_layers_are_numbered_from_zero_in_each_stage_and_the_first_stages_have_more(tmp_path: Path) -> None:
    write(tmp_path / "decoder", Layout(SPEC, None, Parallelism(1, 2)))
    first, last = (load_file(tmp_path / "decoder" / rank_file(rank)) for rank in range(2))
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0", "1"}
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"0"}
    assert "transformer.vocab_embedding.weight" in first and "lm_head.weight" not in first
    assert "transformer.ln_f.weight" in last and "lm_head.weight" in last


@pytest.mark.parametrize(("layers", "stages"), [(80, 3), (80, 7), (5, 5), (4, 3)])
def test_stages_share_the_layers_as_torch_tensor_split_does(layers: int, stages: int) -> None:
    theirs = [part.tolist() for part in torch.arange(layers).tensor_split(stages)]
    assert [list(Parallelism(1, stages).stage_layers(layers, stage)) for stage in range(stages)] == theirs


def test_the_released_decoder_has_the_shapes_of_the_contract() -> None:
    tensors = Layout(RELEASED, FP8, Parallelism(8)).rank_tensors(7)
    assert len(tensors) == 80 * 18 + 3
    assert tensors["transformer.vocab_embedding.weight"] == ("BF16", (19008, 8192))
    assert tensors["transformer.layers.79.attention.qkv.weight"] == ("F8_E4M3", (1280, 8192))
    assert tensors["transformer.layers.79.attention.qkv.bias"] == ("BF16", (1280,))
    assert tensors["transformer.layers.79.attention.dense.weight"] == ("F8_E4M3", (8192, 1024))
    assert tensors["transformer.layers.79.mlp.fc.weight"] == ("F8_E4M3", (3696, 8192))
    assert tensors["transformer.layers.79.mlp.proj.weight"] == ("F8_E4M3", (8192, 3696))
    assert tensors["transformer.layers.79.mlp.gate.activation_scaling_factor"] == ("F32", (1,))
    assert tensors["lm_head.weight"] == ("BF16", (19008, 8192))


def test_a_scale_for_each_row_goes_where_its_row_goes() -> None:
    """dense and proj are shared by columns: every rank has all rows and all scales."""
    layout = Layout(RELEASED, FP8_PER_CHANNEL, Parallelism(8))
    tensors = layout.rank_tensors(0)
    prefix = "transformer.layers.0."
    scales = {name.removeprefix(prefix): shape for name, (_, shape) in tensors.items() if "per_channel" in name}
    assert {name: shape for name, shape in scales.items() if "layers" not in name} == {
        "attention.qkv.per_channel_scale": (1280,),
        "attention.dense.per_channel_scale": (8192,),
        "mlp.fc.per_channel_scale": (3696,),
        "mlp.gate.per_channel_scale": (3696,),
        "mlp.proj.per_channel_scale": (8192,),
    }
    assert len(tensors) == 80 * 13 + 3, "no activation scales: they are found token by token"


def test_an_fp8_kv_cache_adds_one_scale_a_layer() -> None:
    plain, with_cache = (Layout(RELEASED, FP8, Parallelism(2), kv_cache).rank_tensors(1) for kv_cache in (None, FP8))
    assert {name: with_cache[name] for name in with_cache.keys() - plain.keys()} == {
        f"transformer.layers.{index}.attention.kv_cache_scaling_factor": ("F32", (1,)) for index in range(80)
    }


@pytest.mark.parametrize("tensor_parallel", [3, 5, 6, 7, 12, 128])
def test_an_illegal_split_of_the_released_decoder_names_the_legal_ones(tensor_parallel: int) -> None:
    with pytest.raises(NvlmError, match=f"tensor_parallel {tensor_parallel} cannot share 64 heads, 8 key") as caught:
        Layout(RELEASED, FP8, Parallelism(tensor_parallel))
    assert caught.value.hint == "legal: 1, 2, 4, 8, 16, 32, 64"


def test_legal_splits_of_the_released_decoder() -> None:
    assert legal_tensor_parallel(RELEASED) == [1, 2, 4, 8, 16, 32, 64]


def test_config_json_says_everything_the_reader_has_no_or_a_wrong_default_for(tmp_path: Path) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8, Parallelism(2)))
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    expected = {
        "architecture": "Qwen2ForCausalLM",
        "qwen_type": "qwen2",
        "seq_length": 8192,
        "rotary_base": 1e6,
        "attn_bias": True,
        "hidden_act": "silu",
        "intermediate_size": 24,
        "position_embedding_type": "rope_gpt_neox",
        "norm_epsilon": 1e-6,
        "logits_dtype": "float32",
    }
    assert expected.items() <= config.items()
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1, "cp_size": 1, "gpus_per_node": 8}
    assert config["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key", sorted(config_from_layout(Layout(SPEC, FP8))))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8))
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    del config[key]
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(NvlmError, match=f"no key '{key}'"):
        read_checkpoint(tmp_path / "decoder")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"qwen_type": "qwen"}, "qwen_type is 'qwen', expected 'qwen2'"),
        ({"architecture": "LlamaForCausalLM"}, "expected 'Qwen2ForCausalLM'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": "wide"}, "not of a TensorRT-LLM checkpoint"),
        ({"num_attention_heads": 3}, "head_size is 4, expected 5"),
        (
            {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}},
            "quant_algo is 'NVFP4'; supported: 'FP8', 'FP8_PER_CHANNEL_PER_TOKEN' and null",
        ),
        (
            {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}},
            "kv_cache_quant_algo is 'INT8'; supported: 'FP8' and null",
        ),
        ({"quantization": {"quant_algo": "FP8"}}, "no key 'kv_cache_quant_algo'"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": None}}, "lm_head"),
        ({"mapping": {"tp_size": 1, "pp_size": 1, "world_size": 2, "cp_size": 1, "gpus_per_node": 8}}, "world_size"),
        ({"mapping": {"tp_size": 3, "pp_size": 1}}, "tensor_parallel 3 cannot share 4 heads"),
        ({"mapping": 1}, "not of a TensorRT-LLM checkpoint"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8))
    edit(tmp_path / "decoder", **changes)
    with pytest.raises(NvlmError, match=complaint) as caught:
        read_checkpoint(tmp_path / "decoder")
    assert str(tmp_path / "decoder") in str(caught.value)


def test_an_unknown_key_beside_the_known_ones_is_let_through_as_tensorrt_llm_does(tmp_path: Path) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8))
    edit(tmp_path / "decoder", producer={"name": "somebody"})
    assert read_checkpoint(tmp_path / "decoder").config["producer"] == {"name": "somebody"}


def respoil(folder: Path, rank: int, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / rank_file(rank)) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / rank_file(rank))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"transformer.layers.1.mlp.gate.weight": None},
            r"rank1\.safetensors lacks 1 tensor.*layers\.1\.mlp\.gate\.weight",
        ),
        (
            {"transformer.layers.9.mlp.gate.weight": torch.ones(1)},
            r"rank1\.safetensors has besides 1 tensor.*layers\.9",
        ),
        (
            {"transformer.ln_f.weight": torch.ones(15, dtype=torch.bfloat16)},
            r"transformer\.ln_f\.weight in .*rank1\.safetensors is BF16 \[15\], expected BF16 \[16\]",
        ),
        ({"transformer.ln_f.weight": torch.ones(16)}, r"is F32 \[16\], expected BF16 \[16\]"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(
    tmp_path: Path, change: dict[str, torch.Tensor | None], complaint: str
) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8, Parallelism(2)))
    respoil(tmp_path / "decoder", 1, change)
    with pytest.raises(NvlmError, match=complaint):
        read_checkpoint(tmp_path / "decoder")


def test_a_missing_or_truncated_rank_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "decoder", Layout(SPEC, FP8, Parallelism(2)))
    rank = tmp_path / "decoder" / rank_file(1)
    rank.write_bytes(rank.read_bytes()[:-1])
    with pytest.raises(NvlmError, match=r"rank1\.safetensors .*truncated"):
        read_checkpoint(tmp_path / "decoder")
    rank.unlink()
    with pytest.raises(NvlmError, match=r"no rank1\.safetensors"):
        read_checkpoint(tmp_path / "decoder")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NvlmError, match="no TensorRT-LLM checkpoint"):
        read_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "tensor_parallel"),
    [("transformer.layers.0.input_layernorm.weight", 2), ("transformer.layers.0.attention.qkv.weight", 4)],
)
def test_ranks_that_disagree_about_what_both_have_are_refused(tmp_path: Path, name: str, tensor_parallel: int) -> None:
    write(tmp_path / "decoder", Layout(SPEC, None, Parallelism(tensor_parallel)))
    held = load_file(tmp_path / "decoder" / rank_file(1))[name]
    respoil(tmp_path / "decoder", 1, {name: held + 1})
    with pytest.raises(NvlmError, match=f"{name}: tensor-parallel rank 1 differs"):
        read_checkpoint(tmp_path / "decoder").merged()


def test_a_tensor_never_written_or_written_twice_is_our_own_bug(tmp_path: Path) -> None:
    layout = Layout(SPEC)
    with pytest.raises(ValueError, match="never written"), checkpoint_writer(tmp_path, layout) as writer:
        writer.put(layout.tensors[0], torch.zeros(13, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="put twice"), checkpoint_writer(tmp_path, layout) as writer:
        for _ in range(2):
            writer.put(layout.tensors[0], torch.zeros(13, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [torch.zeros(13, 16, dtype=torch.float16), torch.zeros(16, 13).bfloat16()])
def test_a_tensor_of_another_type_or_shape_is_our_own_bug(tmp_path: Path, value: torch.Tensor) -> None:
    with tensor_stream(tmp_path / "file", {"x": ("BF16", (13, 16))}) as stream:
        with pytest.raises(ValueError, match=r"x is .*, its place is for torch\.bfloat16 \[13, 16\]"):
            stream.put("x", value)
        stream.put("x", torch.zeros(13, 16, dtype=torch.bfloat16))


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvlm_deploy.checkpoint.resumable import OpenTensor
    from nvlm_deploy.errors import MachineError

    honest = OpenTensor.append_bytes

    def losing(self: OpenTensor, data: bytes | memoryview) -> None:
        honest(self, data)
        if self.name == "transformer.ln_f.weight":
            self.file.write(b"\xff", self.place.begin)

    monkeypatch.setattr(OpenTensor, "append_bytes", losing)
    with pytest.raises(MachineError, match=r"ln_f\.weight read back from .*rank0\.safetensors differs"):
        write(tmp_path / "decoder", Layout(SPEC))
