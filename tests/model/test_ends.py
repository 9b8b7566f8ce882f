"""The ids that end an answer are read as transformers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.ends import end_ids, pad_id, settings_of_generation
from nvlm_deploy.model.spec import PromptSpec, spec_from_checkpoint
from nvlm_deploy.serving.settings import spec_as_json, spec_from_json


def prompt_of(folder: Path, generation: Any, llm: dict[str, Any]) -> PromptSpec:
    """The prompt's facts of the small model with other files."""
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] = {**config["llm_config"], **llm}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return spec_from_checkpoint(Checkpoint.open(folder)).prompt


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the trained small model; its `<|im_end|>` has id 364, `<|endoftext|>` 362."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' own Qwen2 of one small layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def ends_by_transformers(folder: Path, generation: Any, llm: dict[str, Any]) -> list[int]:
    from transformers import Qwen2ForCausalLM

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **llm}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = Qwen2ForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    return [found] if isinstance(found, int) else list(found)


@pytest.mark.needs("test")
@pytest.mark.parametrize(
    ("generation", "llm"),
    [
        (None, {"eos_token_id": 364}),
        (None, {"eos_token_id": [364, 362]}),
        ({"eos_token_id": 364}, {"eos_token_id": 362}),
        ({"eos_token_id": [364, 362]}, {"eos_token_id": 362}),
        ({"eos_token_id": [362, 364]}, {"eos_token_id": [5]}),
        ({"eos_token_id": 0}, {"eos_token_id": 7}),
    ],
)
def test_the_end_ids_are_those_of_transformers(folder, qwen2_folder, generation, llm) -> None:
    assert list(prompt_of(folder, generation, llm).eos_token_ids) == ends_by_transformers(qwen2_folder, generation, llm)


@pytest.mark.parametrize("generation", [{}, {"_from_model_config": True}, {"eos_token_id": None}])
def test_a_generation_config_without_ends_leaves_those_of_config_json(folder, generation) -> None:
    """transformers would generate for ever."""
    assert prompt_of(folder, generation, {"eos_token_id": [364, 7]}).eos_token_ids == (364, 7)


@pytest.mark.parametrize("ends", [[362, 364], [364, 362], [5, 364, 6]])
def test_the_main_end_is_the_end_of_a_turn_wherever_it_stands_in_the_list(folder, ends) -> None:
    assert prompt_of(folder, {"eos_token_id": ends}, {}).eos_token_id == 364


def test_the_first_end_is_the_main_one_when_the_tokenizer_does_not_tell(folder) -> None:
    (folder / "tokenizer.json").unlink()
    assert prompt_of(folder, {"eos_token_id": [362, 364]}, {}).eos_token_id == 362


@pytest.mark.parametrize(
    ("generation", "llm", "telling"),
    [
        ({"eos_token_id": []}, {}, r"generation_config\.json\.eos_token_id is \[\], expected a token id"),
        ({"eos_token_id": "364"}, {}, r"eos_token_id is '364'"),
        ({"eos_token_id": [364, None]}, {}, r"eos_token_id is \[364, None\]"),
        ({"eos_token_id": True}, {}, "eos_token_id is True"),
        (
            {"eos_token_id": [364, 512]},
            {},
            r"generation_config\.json\.eos_token_id is 512, outside the vocabulary of 512",
        ),
        (None, {"eos_token_id": [-1]}, r"llm_config\.eos_token_id is -1, outside the vocabulary"),
        (None, {"eos_token_id": None}, "have no eos_token_id: an answer would never end"),
    ],
)
def test_ends_that_are_no_token_ids_are_refused_by_name(folder, generation, llm, telling) -> None:
    with pytest.raises(NvlmError, match=telling):
        prompt_of(folder, generation, llm)


def test_bos_token_id_is_not_demanded_since_nothing_uses_it(folder) -> None:
    found = prompt_of(folder, {"eos_token_id": 364}, {"bos_token_id": None})
    assert found == PromptSpec(364, (364,), 364)


@pytest.mark.parametrize(
    ("generation", "llm", "expected"),
    [
        ({"pad_token_id": 3}, {"pad_token_id": 4}, 3),
        ({}, {"pad_token_id": 4}, 4),
        ({}, {"bos_token_id": 9}, 9),
        ({}, {"pad_token_id": -1, "bos_token_id": 9}, 9),
        ({}, {"pad_token_id": 512}, 7),
    ],
)
def test_the_padding_id_is_the_first_usable_one(generation, llm, expected) -> None:
    places = settings_of_generation({"llm_config": llm}, generation)
    assert pad_id(places, 512, default=7) == expected


def test_each_end_is_listed_once() -> None:
    assert end_ids([("here", {"eos_token_id": [5, 5, 4, 5]})], 6) == (5, 4)


def test_all_ends_survive_the_round_trip_through_json(folder) -> None:
    prompt_of(folder, {"eos_token_id": [362, 364]}, {})
    spec = spec_from_checkpoint(Checkpoint.open(folder))
    assert spec_from_json(spec_as_json(spec)) == spec


@pytest.mark.parametrize("ends", [[], [362], [364, 512], [364, -1], "364", [364.5]])
def test_a_written_spec_with_impossible_ends_is_damaged(tiny_spec, ends) -> None:
    document = json.loads(spec_as_json(tiny_spec))
    document["prompt"]["eos_token_ids"] = ends
    with pytest.raises(NvlmError, match=r"model_spec\.json is damaged"):
        spec_from_json(json.dumps(document))
