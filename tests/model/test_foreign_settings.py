"""Every setting of a checkpoint's files is honoured, neutralised and reported, or refused by name: none in silence."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.cli.inspect import facts_of
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.foreign.setting import CONFIG, LLM, TOKENIZER_MODEL, VISION, Documents, Treatment, findings_of
from nvlm_deploy.model.foreign.settings import foreign_settings
from nvlm_deploy.model.foreign.table import KNOWN, TABLE
from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.profile import load_profile
from nvlm_deploy.recipe import Recipe

Edit = Callable[[dict[str, Any]], object]

# keys of the released config.json as far as they are published (facts nvlm-d.md section 1), beside NVLM_D_72B's
PUBLISHED = {
    "": {"auto_map": {"AutoModel": "modeling_nvlm_d.NVLM_D_Model"}, "model_type": "NVLM_D", "torch_dtype": "bfloat16"},
    "llm_config": {
        "_name_or_path": "Qwen/Qwen2-72B-Instruct",
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "do_sample": False,
        "initializer_range": 0.02,
        "max_length": 20,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 80,
        "rope_scaling": None,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "pruned_heads": {},
        "is_decoder": False,
        "bad_words_ids": None,
        "pretraining_tp": 1,
        "use_cache": True,
    },
    "vision_config": {
        "model_type": "intern_vit_6b",
        "initializer_factor": 0.1,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "use_flash_attn": True,
        "num_channels": 3,
        "max_length": 20,
        "top_k": 50,
    },
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the trained small model."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(folder: Path, name: str, change: Edit) -> None:
    path = folder / name
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def at(path: str, value: object) -> Edit:
    """Set one key; `path` leads to it through sections and list positions."""
    *sections, key = path.split(".")

    def change(document: Any) -> None:
        for section in sections:
            document = document[int(section) if section.isdecimal() else section]
        document[key] = value

    return change


def without(path: str) -> Edit:
    *sections, key = path.split(".")

    def change(document: dict[str, Any]) -> None:
        for section in sections:
            document = document[section]
        document.pop(key, None)

    return change


def rename_letter(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!!"] = vocabulary.pop("°")


def lines(folder: Path, treatment: Treatment) -> str:
    return "\n".join(foreign_settings(Checkpoint.open(folder)).lines(treatment))


def test_the_small_model_and_the_released_one_are_clean(tiny_folder: Path) -> None:
    assert foreign_settings(Checkpoint.open(tiny_folder)).as_json() == {}
    sections = {name: {**NVLM_D_72B[name], **PUBLISHED[name]} for name in ("llm_config", "vision_config")}
    documents = Documents.of_config({**NVLM_D_72B, **PUBLISHED[""], **sections})
    assert findings_of(TABLE, documents) == []
    for place in (CONFIG, LLM, VISION):
        assert [key for key in documents.places[place] if (place, key) not in KNOWN and key[0] != "_"] == []


def test_each_key_says_something_in_one_line_of_the_table_only() -> None:
    said = Counter((setting.place, setting.key) for setting in TABLE if setting.effect or setting.absent)
    assert [key for key, count in said.items() if count > 1] == []


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [362], "tokens": ["<|endoftext|>"]}},
}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 362,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("name", "change", "telling"),
    [
        ("tokenizer.json", at("truncation", TRUNCATION), "tokenizer.json: truncation = {'direction'"),
        ("tokenizer.json", at("padding", PADDING), "padding = {'strategy'"),
        ("tokenizer.json", at("post_processor", TEMPLATE), "post_processor = {'type': 'TemplateProcessing'"),
        ("tokenizer.json", at("model.dropout", 0.1), "tokenizer.json model: dropout = 0.1"),
        ("config.json", at("llm_config.attention_bias", False), "llm_config: attention_bias = False"),
        ("config.json", at("llm_config.torch_dtype", "float16"), "torch_dtype = 'float16'"),
        ("config.json", at("vision_config.dtype", "float32"), "vision_config: dtype = 'float32'"),
        ("config.json", at("llm_config.repetition_penalty", 1.1), "llm_config: repetition_penalty = 1.1"),
        ("config.json", at("template", "Hermes-2"), "template = 'Hermes-2'"),
        ("config.json", at("system_message", "You are a pirate."), "system_message"),
        ("config.json", at("pad2square", True), "pad2square = True"),
        ("config.json", at("image_token_index", 374), "image_token_index = 374: not obeyed: images take the places of"),
        ("generation_config.json", at("do_sample", True), "do_sample = True"),
        ("generation_config.json", at("temperature", 0.7), "temperature = 0.7"),
        ("generation_config.json", at("suppress_tokens", [5]), r"suppress_tokens = [5]"),
        ("generation_config.json", at("forced_bos_token_id", 5), "forced_bos_token_id = 5"),
        ("generation_config.json", at("max_new_tokens", 2048), "max_new_tokens = 2048"),
        ("generation_config.json", at("num_beams", 4), "num_beams = 4"),
        ("generation_config.json", at("penalty_alpha", 0.6), "penalty_alpha = 0.6"),
        ("generation_config.json", at("stop_strings", ["END"]), "stop_strings = ['END']"),
        ("tokenizer_config.json", at("add_bos_token", True), "add_bos_token = True"),
        ("tokenizer_config.json", at("add_prefix_space", True), "add_prefix_space = True"),
        ("tokenizer_config.json", at("split_special_tokens", True), "split_special_tokens = True"),
        ("tokenizer_config.json", at("clean_up_tokenization_spaces", True), "clean_up_tokenization_spaces = True"),
        ("tokenizer_config.json", at("additional_special_tokens", ["<tool_call>"]), "['<tool_call>']: not obeyed"),
        (
            "tokenizer_config.json",
            at("unk_token", {"content": "</tool_call>"}),
            "unk_token = ['</tool_call>']: not obeyed",
        ),
        (
            "tokenizer_config.json",
            at("added_tokens_decoder", {"376": {"content": "<tool_call>", "special": True}}),
            "added_tokens_decoder = ['<tool_call>']",
        ),
        (
            "tokenizer_config.json",
            at("chat_template", "{{ bos_token }}[INST]"),
            "chat_template = '{{ bos_token }}[INST]'",
        ),
        ("preprocessor_config.json", at("max_dynamic_patch", 12), "max_dynamic_patch = 12: not obeyed: config.json"),
        ("model.safetensors.index.json", at("metadata.total_size", 5), "metadata.total_size = 5: not used: the shards"),
    ],
)
def test_what_has_no_effect_is_reported_with_its_value(folder: Path, name: str, change: Edit, telling: str) -> None:
    edit(folder, name, change)
    assert telling in lines(folder, Treatment.NEUTRALISED)
    facts_of(folder)


@pytest.mark.parametrize(
    ("name", "change", "telling"),
    [
        ("tokenizer.json", at("normalizer", {"type": "Lowercase"}), "normalizer = {'type': 'Lowercase'}"),
        ("tokenizer.json", at("pre_tokenizer.pretokenizers.1.add_prefix_space", True), "pre_tokenizer = "),
        ("tokenizer.json", at("normalizer", None), "normalizer = None"),
        ("tokenizer.json", at("pre_tokenizer", None), "pre_tokenizer = None"),
        ("tokenizer.json", at("model.unk_token", "<|endoftext|>"), "unk_token = '<|endoftext|>'"),
        ("tokenizer.json", rename_letter, "vocab lacks = "),
        ("tokenizer.json", at("model.byte_fallback", True), "byte_fallback = True"),
        ("tokenizer.json", at("model.ignore_merges", True), "ignore_merges = True"),
        ("tokenizer.json", at("added_tokens.14.lstrip", True), "added_tokens.lstrip = ['<tool_call>']"),
        ("tokenizer.json", at("added_tokens.14.normalized", True), "added_tokens.normalized = ['<tool_call>']"),
        ("generation_config.json", at("eos_token_id", [364, 362]), "eos_token_id = [364, 362]: each of them ends"),
        ("config.json", at("llm_config.eos_token_id", 362), "eos_token_id = [364]: used as in transformers"),
        (
            "config.json",
            at("llm_config.rope_parameters", {"rope_type": "default", "rope_theta": 700.0}),
            "rope_theta = 1000000.0: 700.0 of rope_parameters is used",
        ),
    ],
)
def test_what_takes_effect_as_in_transformers_is_listed(folder: Path, name: str, change: Edit, telling: str) -> None:
    edit(folder, name, change)
    assert telling in lines(folder, Treatment.HONOURED)
    facts_of(folder)


@pytest.mark.parametrize(
    ("name", "key", "telling"),
    [
        ("config.json", "llm_config.rope_theta", "rope_theta is missing: 10000 is used, transformers' default"),
        ("config.json", "llm_config.rms_norm_eps", "rms_norm_eps is missing: 1e-06 is used"),
        ("config.json", "llm_config.vocab_size", "vocab_size is missing: the rows of embed_tokens.weight are counted"),
        ("config.json", "llm_config.num_key_value_heads", "the rows of k_proj.weight are counted"),
        ("config.json", "llm_config.max_position_embeddings", "max_position_embeddings is missing: 32768 is used"),
        ("config.json", "vision_config.layer_norm_eps", "layer_norm_eps is missing: 1e-06 is used"),
        ("config.json", "ps_version", "ps_version is missing: v2 is used"),
        ("config.json", "use_thumbnail", "use_thumbnail is missing"),
        ("config.json", "dynamic_image_size", "dynamic_image_size is missing"),
        ("config.json", "max_dynamic_patch", "max_dynamic_patch is missing: 6 is used"),
        ("generation_config.json", "eos_token_id", "eos_token_id is missing: config.json's is used"),
    ],
)
def test_what_is_used_for_a_missing_key_is_said(folder: Path, name: str, key: str, telling: str) -> None:
    edit(folder, name, without(key))
    assert telling in lines(folder, Treatment.ASSUMED)
    facts_of(folder)


def test_missing_sizes_are_those_of_the_weights(folder: Path) -> None:
    edit(folder, "config.json", without("llm_config.vocab_size"))
    edit(folder, "config.json", without("llm_config.num_key_value_heads"))
    decoder = facts_of(folder)["decoder spec"]
    assert (decoder["vocab_size"], decoder["kv_heads"]) == (512, 2)


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_a_key_that_no_answer_depends_on_is_not_demanded(folder: Path, key: str) -> None:
    for name, path in (("config.json", f"llm_config.{key}"), ("generation_config.json", key)):
        edit(folder, name, without(path))
    assert facts_of(folder)["prompt spec"]["eos_token_id"] == 364


@pytest.mark.parametrize(
    ("name", "change", "telling"),
    [
        ("config.json", at("llm_config.rope_scaling", {"type": "linear", "factor": 2}), "rope_type is 'linear'"),
        ("config.json", at("llm_config.rope_parameters", {"rope_type": "yarn"}), "rope_type is 'yarn'"),
        (
            "config.json",
            at("llm_config.rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
            "full_attention has parameters of its own",
        ),
        ("config.json", at("llm_config.tie_word_embeddings", True), "tie_word_embeddings is True"),
        ("config.json", at("tie_word_embeddings", True), "tie_word_embeddings is True"),
        ("config.json", at("llm_config.use_sliding_window", True), "use_sliding_window is True"),
        ("config.json", at("llm_config.layer_types", ["sliding_attention"] * 4), "layer_types is .'sliding_attention'"),
        ("config.json", at("llm_config.hidden_act", "gelu"), "hidden_act is 'gelu'"),
        ("config.json", at("llm_config.partial_rotary_factor", 0.5), "partial_rotary_factor is 0.5"),
        ("config.json", at("llm_config.qk_norm", True), "qk_norm is True"),
        ("config.json", at("llm_config.head_dim", 64), "head_dim is 64"),
        ("config.json", at("llm_config.quantization_config", {"quant_method": "awq"}), "quantised already"),
        ("config.json", at("llm_config.vocab_size", 500), r"has shape \[512, 256\], expected \[500, 256\]"),
        ("config.json", at("vision_config.qkv_bias", True), "qkv_bias is True"),
        ("config.json", at("vision_config.qk_normalization", None), "qk_normalization is None"),
        ("config.json", at("vision_config.norm_type", "layer_norm"), "norm_type is 'layer_norm'"),
        ("config.json", at("vision_config.hidden_act", "gelu_new"), "hidden_act is 'gelu_new'"),
        ("config.json", at("vision_config.num_hidden_layers", 3), "tensors that its config.json does not know"),
        ("config.json", at("use_backbone_lora", 8), "use_backbone_lora is 8; the weights are in LoRA's layout"),
        ("config.json", at("select_layer", -2), "select_layer is -2"),
        ("tokenizer.json", at("model.continuing_subword_prefix", "##"), "continuing_subword_prefix is '##'"),
        ("tokenizer.json", at("model.end_of_word_suffix", "</w>"), "end_of_word_suffix is '</w>'"),
        ("tokenizer.json", at("model.type", "WordLevel"), "type is 'WordLevel'; only 'BPE'"),
        ("tokenizer.json", at("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}), "only ByteLevel"),
        ("tokenizer.json", at("decoder", None), "only ByteLevel"),
        ("tokenizer.json", without("decoder"), "only ByteLevel"),
        ("tokenizer.json", at("added_tokens.21.id", 512), "id of <.file_sep.> is 512; outside the model's vocabulary"),
        ("tokenizer.json", at("added_tokens.2.id", 363), "added token '<.im_end.>' has id 363, which another token"),
        ("tokenizer.json", at("added_tokens.2.id", 5), "added token '<.im_end.>' has id 5"),
        ("tokenizer.json", at("added_tokens.21.id", 400), "has id 400, which another token has or which leaves a gap"),
        ("tokenizer.json", at("model.vocab.!", 5), "id 5 is that of 2 tokens"),
        ("tokenizer.json", at("model.vocab.漢字", 361), "vocab is .*"),
        ("tokenizer.json", at("added_tokens.2.special", False), r"special of <\|im_end\|> is False; only true"),
        ("tokenizer.json", at("added_tokens.11.special", False), r"special of <\|vision_pad\|> is False"),
        ("preprocessor_config.json", at("image_mean", [0.5, 0.5, 0.5]), r"image_mean is \[0.5, 0.5, 0.5\]; only"),
        ("preprocessor_config.json", at("image_std", [0.5, 0.5, 0.5]), "image_std is"),
        ("preprocessor_config.json", at("size", {"height": 448, "width": 448}), "size is .*only the model's 56"),
        ("preprocessor_config.json", at("crop_size", 224), "crop_size is 224"),
        ("preprocessor_config.json", at("resample", 2), "resample is 2"),
        ("preprocessor_config.json", at("do_normalize", False), "do_normalize is False"),
        ("preprocessor_config.json", at("rescale_factor", 0.5), "rescale_factor is 0.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(folder: Path, name: str, change: Edit, telling: str) -> None:
    edit(folder, name, change)
    with pytest.raises(NvlmError, match=telling):
        facts_of(folder)


def test_a_preprocessor_that_says_what_the_model_does_is_plain(folder: Path) -> None:
    edit(folder, "preprocessor_config.json", at("size", {"height": 56, "width": 56}))
    edit(folder, "preprocessor_config.json", at("rescale_factor", 0.00392156862745098))
    assert foreign_settings(Checkpoint.open(folder)).as_json() == {}


def test_an_odd_head_size_is_refused_by_the_spec(folder: Path) -> None:
    """RoPE rotates pairs of channels: torch would stop at the first prompt."""
    edit(folder, "config.json", at("llm_config.hidden_size", 248))
    with pytest.raises(NvlmError, match="head size 31 is not a multiple of the pairs of channels that RoPE rotates, 2"):
        facts_of(folder)


@pytest.mark.parametrize("written", ["tf", "flax", "np", "TF"])
def test_weights_in_the_layout_of_another_library_are_refused(folder: Path, written: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    size = int.from_bytes(shard.read_bytes()[:8], "little")
    header = json.loads(shard.read_bytes()[8 : 8 + size])
    header["__metadata__"] = {"format": written}
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + shard.read_bytes()[8 + size :])
    with pytest.raises(NvlmError, match=f"{shard.name} .*format '{written}', expected 'pt'"):
        facts_of(folder)


@pytest.mark.parametrize("outside", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, outside: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["mlp1.0.weight"] = outside
    path.write_text(json.dumps(index))
    with pytest.raises(NvlmError, match=r"outside the folder|shards missing"):
        facts_of(folder)


def test_a_chat_template_in_a_file_of_its_own_is_reported_too(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
    assert lines(folder, Treatment.NEUTRALISED) == ""
    file.write_text("<|im_start|>system\nYou are a pirate.<|im_end|>")
    assert lines(folder, Treatment.NEUTRALISED).startswith("chat_template.jinja: chat_template = ")


def test_an_image_size_that_the_positions_do_not_have_is_refused(folder: Path) -> None:
    edit(folder, "config.json", at("force_image_size", 112))
    edit(folder, "config.json", at("vision_config.image_size", 112))
    edit(folder, "preprocessor_config.json", lambda document: document.clear())
    with pytest.raises(NvlmError, match=r"position_embedding .*has shape \[1, 17, 128\], expected \[1, 65, 128\]"):
        facts_of(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_settings_file_that_is_no_json_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(NvlmError, match=f"{name} is not JSON"):
        facts_of(folder)


@pytest.mark.needs("build")
def test_weights_in_another_type_are_reported(folder: Path) -> None:
    import torch

    from nvlm_deploy.checkpoint.writer import write_shards

    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.tensor(name).to(torch.float32) for name in checkpoint.names}
    for old in folder.glob("*.safetensors"):
        old.unlink()
    write_shards(folder, tensors.items(), max_shard_bytes=10**9)
    assert "safetensors: dtype = ['F32']" in lines(folder, Treatment.NEUTRALISED)


def test_keys_that_nvlm_does_not_know_are_listed_by_place(folder: Path) -> None:
    edit(folder, "config.json", at("llm_config.final_logit_softcapping", 30.0))
    edit(folder, "tokenizer.json", at("model.novelty", 1))
    edit(folder, "generation_config.json", at("novelty", None))
    unknown = foreign_settings(Checkpoint.open(folder)).unknown
    expected = {LLM: ("final_logit_softcapping",), "generation_config.json": ("novelty",)}
    assert unknown == {**expected, TOKENIZER_MODEL: ("novelty",)}


def test_a_build_warns_once_of_each_file(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, "generation_config.json", at("temperature", 0.7))
    edit(folder, "generation_config.json", at("top_p", 0.8))
    edit(folder, "config.json", without("llm_config.rope_theta"))
    recipe = Recipe(folder, load_profile("cpu"), tmp_path / "work")
    with caplog.at_level(logging.WARNING):
        assert recipe.spec is recipe.spec
    assert [record.message.split(":")[0] for record in caplog.records] == ["generation_config.json", "llm_config"]
    assert "temperature = 0.7, top_p = 0.8" in caplog.text


def test_a_build_refuses_what_inspect_refuses(folder: Path, tmp_path: Path) -> None:
    edit(folder, "preprocessor_config.json", at("image_std", [1, 1, 1]))
    with pytest.raises(NvlmError, match=r"image_std is \[1, 1, 1\]"):
        _ = Recipe(folder, load_profile("cpu"), tmp_path / "work").spec


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def opened(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("any") / "model"))


@pytest.mark.slow
@given(setting=st.sampled_from(TABLE), value=ANY_JSON)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_known_key_holds_it_is_judged_or_refused(opened: Path, setting: Any, value: Any) -> None:
    """Never a traceback: the tokenizers library panics, torch stops and Python raises on some of these."""
    places = {LLM: ("config.json", LLM), VISION: ("config.json", VISION), TOKENIZER_MODEL: ("tokenizer.json", "model")}
    name, section = places.get(setting.place, (setting.place, None))
    original = (opened / name).read_text()
    document = json.loads(original)
    (document[section] if section else document)[setting.key] = value
    (opened / name).write_text(json.dumps(document))
    try:
        facts_of(opened)
    except NvlmError:
        pass
    finally:
        (opened / name).write_text(original)
