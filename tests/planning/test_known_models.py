"""Models of plans: totals of the released one, and folders of which only config.json or the index is there."""

from __future__ import annotations

import json
import shutil

import pytest

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.released import NVLM_D_72B
from nvlm_deploy.planning.known_models import planned_model


def test_the_released_model_has_the_parameters_it_is_listed_with(released):
    """facts nvlm-d.md section 1."""
    assert released.parameters == 79_379_593_344
    assert released.parameters_by_part == {
        "vision_model": 6_052_672_640,
        "projector": 620_717_056,
        "language_model": 72_706_203_648,
    }
    assert f"{released.checkpoint_bytes / 2**30:.1f}" == "147.9"
    assert f"{released.checkpoint_bytes / 1e9:.2f}" == "158.76"


def test_config_json_alone_is_enough(tmp_path, released):
    (tmp_path / "config.json").write_text(json.dumps(NVLM_D_72B))
    assert planned_model(tmp_path).spec == released.spec


def test_the_index_tells_how_many_dummy_heads_there_are_without_any_shard(tmp_path, tiny_folder):
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(tiny_folder / name, tmp_path)
    model = planned_model(tmp_path)
    assert model.spec.vision.padded_heads == 11
    assert model.checkpoint_bytes == Checkpoint.open(tiny_folder).size_bytes
    assert model.evidence == "measured"


def test_another_number_of_dummy_heads_is_seen_in_the_total(tmp_path, tiny_folder):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    index = json.loads((tiny_folder / "model.safetensors.index.json").read_text())
    a_head = 2 * 4 * 32 * (4 * 128 + 2)  # bytes x layers x head size x (q, k, v, output rows and two norms)
    index["metadata"]["total_size"] -= 3 * a_head
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert planned_model(tmp_path).spec.vision.padded_heads == 8


@pytest.mark.parametrize(
    ("edit", "telling"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (
            lambda index: index["weight_map"].pop("mlp1.1.weight"),
            r"lacks 1 tensors of the model, first mlp1\.1\.weight",
        ),
        (lambda index: index["metadata"].update(total_size=123456), "do not explain the difference"),
    ],
)
def test_an_index_of_another_model_is_refused(tmp_path, tiny_folder, edit, telling):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    index = json.loads((tiny_folder / "model.safetensors.index.json").read_text())
    edit(index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NvlmError, match=telling):
        planned_model(tmp_path)


SIZES = [
    ("llm_config", key)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
]
SIZES += [
    ("vision_config", key)
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
]
SIZES += [("config.json", key) for key in ("force_image_size", "min_dynamic_patch", "max_dynamic_patch")]
# transformers reads null in these two: as many heads as query heads, and the encoder's own image size
NULLABLE = {("llm_config", "num_key_value_heads"), ("config.json", "force_image_size")}
NONSENSE = [10**9, 10**12, 10**400, -1, 0, True, 2.5, 1e12, "80", None, [80]]


CASES = [(*size, value) for size in SIZES for value in NONSENSE if value is not None or size not in NULLABLE]


@pytest.mark.parametrize(("section", "key", "value"), CASES, ids=lambda value: repr(value)[:24])
def test_a_size_that_no_model_has_is_refused_by_name(tmp_path, section, key, value):
    config = json.loads(json.dumps(NVLM_D_72B))
    (config if section == "config.json" else config[section])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NvlmError, match=rf"{section}\.{key} is .*(expected a|no such model)") as refusal:
        planned_model(tmp_path)
    assert len(refusal.value.message) < 160


def test_null_says_as_much_as_in_transformers(tmp_path):
    config = json.loads(json.dumps(NVLM_D_72B))
    config["force_image_size"] = config["llm_config"]["num_key_value_heads"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = planned_model(tmp_path).spec
    assert (spec.tiling.tile_size, spec.decoder.kv_heads) == (448, 64)


@pytest.mark.parametrize("key", ["vocab_size", "num_key_value_heads"])
def test_without_weights_a_missing_size_is_named_and_not_the_72b_models(tmp_path, key):
    config = json.loads(json.dumps(NVLM_D_72B))
    del config["llm_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NvlmError, match=rf"llm_config\.{key} is missing"):
        planned_model(tmp_path)


def test_a_number_that_no_float_holds_is_refused_by_name(tmp_path):
    config = json.loads(json.dumps(NVLM_D_72B))
    config["llm_config"]["rope_theta"] = 10**400
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NvlmError, match=r"llm_config\.rope_theta is 1000"):
        planned_model(tmp_path)


def test_an_index_cannot_ask_for_more_heads_than_a_model_has(tmp_path, tiny_folder):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    index = json.loads((tiny_folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 10**9 * 2 * 4 * 32 * (4 * 128 + 2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NvlmError, match="do not explain the difference"):
        planned_model(tmp_path)


def test_neither_both_and_unknown_are_refused_with_what_there_is(tmp_path):
    with pytest.raises(NvlmError, match="nothing to plan for"):
        planned_model()
    with pytest.raises(NvlmError, match="both a checkpoint"):
        planned_model(tmp_path, "nvlm-d-72b")
    with pytest.raises(NvlmError, match="no built-in spec 'nvlm'") as refusal:
        planned_model(spec_name="nvlm")
    assert "nvlm-d-72b" in (refusal.value.hint or "")


def test_a_spec_given_as_a_folder_is_told_how_to_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NvlmError, match="--spec nvlm-d-72b"):
        planned_model(tmp_path / "nvlm-d-72b")
