"""transformers is the oracle: what it does with a setting is what is done here, or what the table says is otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvlm_deploy.model.foreign.setting import (
    CONFIG,
    GENERATION,
    LLM,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    VISION,
    Documents,
    findings_of,
)
from nvlm_deploy.model.foreign.table import KNOWN, TABLE
from nvlm_deploy.model.prompt import PromptBuilder
from nvlm_deploy.model.spec import ModelSpec, spec_from_config
from nvlm_deploy.model.tokenizer import open_tokenizer, text_without_leftovers

pytestmark = pytest.mark.slow

TEXT = "Which digit is in tile 3? Ａ ﬁ e\u0301 Ünïcödé 漢字 🙂 <tool_call> and a word<tool_call>"
DIGITS = "How many digits are in all tiles? Read all digits in order, please answer the questions."


def test_every_key_of_generation_has_a_line_and_its_default_is_plain() -> None:
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    keys = {key for key in GenerationConfig().to_dict() if not key.startswith("_")} | set(defaults)
    assert {key for key in keys if (GENERATION, key) not in KNOWN} == set()
    assert findings_of(TABLE, Documents({GENERATION: defaults})) == []


def test_every_key_of_a_qwen2_config_has_a_line_and_its_default_is_plain() -> None:
    from transformers import Qwen2Config

    document = Qwen2Config(architectures=["Qwen2ForCausalLM"], num_hidden_layers=4).to_dict()
    assert [key for key in document if (LLM, key) not in KNOWN and not key.startswith("_")] == []
    assert findings_of(TABLE, Documents({LLM: document})) == []


def test_every_key_of_any_config_has_a_line_in_each_section() -> None:
    from transformers import PreTrainedConfig

    keys = [key for key in PreTrainedConfig().to_dict() if not key.startswith("_")]
    assert [(place, key) for place in (CONFIG, LLM, VISION) for key in keys if (place, key) not in KNOWN] == []


def test_every_key_that_transformers_writes_of_a_tokenizer_has_a_line(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    keys = [(TOKENIZER_CONFIG, key) for key in written] + [(TOKENIZER, key) for key in tokenizer]
    keys += [(TOKENIZER_MODEL, key) for key in tokenizer["model"]]
    assert [key for key in keys if key not in KNOWN] == []


THETAS = st.none() | st.sampled_from([500.0, 10000.0, 1e6])
PARAMETERS = st.none() | st.fixed_dictionaries(
    {}, optional={"rope_theta": st.sampled_from([300.0, 2e6]), "rope_type": st.just("default")}
)


@given(theta=THETAS, parameters=PARAMETERS, place=st.sampled_from(["rope_parameters", "rope_scaling"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_rotary_base_is_that_of_transformers(tiny_config, theta, parameters, place) -> None:
    from transformers import Qwen2Config

    stated: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if parameters is not None:
        stated[place] = parameters
    llm = {key: value for key, value in tiny_config["llm_config"].items() if key != "rope_theta"}
    ours = spec_from_config({**tiny_config, "llm_config": {**llm, **stated}}).decoder.rotary_base
    theirs = Qwen2Config(**json.loads(json.dumps({**stated, "num_hidden_layers": 1}))).rope_parameters["rope_theta"]
    assert ours == theirs


def test_qwen2_has_its_biases_whatever_attention_bias_says() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    answers = []
    for bias in (True, False):
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, attention_bias=bias)
        model = Qwen2ForCausalLM(config).eval()
        assert model.model.layers[0].self_attn.q_proj.bias is not None
        answers.append(model(torch.arange(5)[None]).logits)
    assert torch.equal(*answers)


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads(source.read_text())
    edit(document)
    (target / "tokenizer.json").write_text(json.dumps(document))
    return target / "tokenizer.json"


def ids_by_transformers(file: Path, text: str) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    ids = PreTrainedTokenizerFast(tokenizer_file=str(file))(text, add_special_tokens=False)["input_ids"]
    return list(ids)


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 200},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 362,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
SEQUENCE = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    "edit",
    [
        lambda tokenizer: None,
        lambda tokenizer: tokenizer.update(truncation=TRUNCATION),
        lambda tokenizer: tokenizer.update(padding=PADDING),
        lambda tokenizer: tokenizer.update(truncation=TRUNCATION, padding=PADDING),
        lambda tokenizer: tokenizer.update(normalizer=None),
        lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}),
        lambda tokenizer: tokenizer.update(normalizer=SEQUENCE),
        lambda tokenizer: tokenizer["pre_tokenizer"]["pretokenizers"].__setitem__(1, PREFIX),
        lambda tokenizer: tokenizer["model"].update(byte_fallback=True, ignore_merges=True),
        lambda tokenizer: tokenizer["model"].update(continuing_subword_prefix="", end_of_word_suffix=""),
        lambda tokenizer: tokenizer["added_tokens"][14].update(lstrip=True, rstrip=True),
        lambda tokenizer: tokenizer["added_tokens"][14].update(single_word=True),
        lambda tokenizer: tokenizer["added_tokens"][14].update(special=True, normalized=True),
    ],
    ids=range(13),
)
def test_a_prompts_ids_are_those_of_transformers(
    tokenizer_file: Path, tmp_path: Path, tiny_spec: ModelSpec, edit: Callable[[dict[str, Any]], object]
) -> None:
    file = edited(tokenizer_file, tmp_path, edit)
    builder = PromptBuilder(file, tiny_spec)
    builder.require_matches(tiny_spec)
    text = builder.text(TEXT, [3])
    assert builder.tokenizer.encode(text, add_special_tokens=False).ids == ids_by_transformers(file, text)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
def test_random_merges_are_switched_off_which_transformers_obeys(
    tokenizer_file: Path, tmp_path: Path, tiny_spec: ModelSpec, dropout: float
) -> None:
    file = edited(tokenizer_file, tmp_path, lambda tokenizer: tokenizer["model"].update(dropout=dropout))
    plain = PromptBuilder(tokenizer_file, tiny_spec).ids(DIGITS, [3])
    assert all(PromptBuilder(file, tiny_spec).ids(DIGITS, [3]) == plain for _ in range(3))
    assert ids_by_transformers(file, DIGITS) != open_tokenizer(file).encode(DIGITS, add_special_tokens=False).ids


def test_what_another_engine_gets_has_no_leftovers_either(tokenizer_file: Path, tmp_path: Path) -> None:
    leftovers = {"truncation": TRUNCATION, "padding": PADDING}
    file = edited(tokenizer_file, tmp_path, lambda one: (one.update(leftovers), one["model"].update(dropout=0.5)))
    neutral = text_without_leftovers(file)
    assert neutral is not None
    file.write_text(neutral)
    assert ids_by_transformers(file, DIGITS) == ids_by_transformers(tokenizer_file, DIGITS)
    assert text_without_leftovers(tokenizer_file) is None


def test_a_template_adds_nothing_to_the_prompt(tokenizer_file: Path, tmp_path: Path, tiny_spec: ModelSpec) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [362], "tokens": ["<|endoftext|>"]}},
    }
    file = edited(tokenizer_file, tmp_path, lambda tokenizer: tokenizer.update(post_processor=template))
    assert open_tokenizer(file).encode("a").ids[0] == 362
    assert PromptBuilder(file, tiny_spec).ids(DIGITS) == PromptBuilder(tokenizer_file, tiny_spec).ids(DIGITS)


def test_stop_words_are_not_padded_either(tokenizer_file: Path, tmp_path: Path, tiny_spec: ModelSpec) -> None:
    file = edited(tokenizer_file, tmp_path, lambda tokenizer: tokenizer.update(truncation=TRUNCATION, padding=PADDING))
    encode = PromptBuilder(file, tiny_spec).tokenizer.encode
    assert encode(DIGITS).ids == PromptBuilder(tokenizer_file, tiny_spec).tokenizer.encode(DIGITS).ids
