"""The model `tensorrt_llm` against the config.pbtxt that comes with TensorRT-LLM, tensor by tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_deploy.triton.choices import EngineChoices, ServingChoices
from nvlm_deploy.triton.decoder import decoder_config
from nvlm_deploy.triton.pbtxt import ModelConfig, TensorConfig, config_text

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from upstream_interface import INPUTS, OUTPUTS, PARAMETERS, WITHOUT_DEFAULT

# what we fill in where upstream's template leaves it open: engines compute in BF16 and give float32 logits
FILLED = {"<logits>": "FP32", "<table>": "BF16", "<any>": "FP16"}
ENGINES = EngineChoices(kv_tokens=4096, kv_share_of_free=0.9)


def config_of(spec, **choices: object) -> ModelConfig:
    return decoder_config(spec, ServingChoices(**{"max_batch_size": 4, "engines": ENGINES, **choices}))


def upstream(table: str) -> Iterator[tuple[str, str, tuple[int, ...], list[str]]]:
    for line in table.strip().splitlines():
        name, kind, dims, *how = line.split()
        yield name, f"TYPE_{FILLED.get(kind, kind)}", tuple(int(size) for size in dims.split(",")), how


def how_it_comes(tensor: TensorConfig) -> list[str]:
    way = "value" if tensor.reshape == () else "ragged" if tensor.ragged else "plain"
    return [way] if tensor.optional else [way, "required"]


@pytest.mark.parametrize("engines", [ENGINES, None], ids=["engines", "reference"])
def test_every_input_is_upstreams_whichever_decoder_is_behind_it(tiny_spec, engines) -> None:
    expected = {name: (kind, dims, how) for name, kind, dims, how in upstream(INPUTS)}
    # only the width of the table is said more closely
    expected["prompt_embedding_table"] = ("TYPE_BF16", (-1, tiny_spec.decoder.hidden_size), ["ragged"])
    if engines is None:  # which makes the answer's text as well
        expected["stop_texts"] = ("TYPE_STRING", (-1,), ["ragged"])
    found = config_of(tiny_spec, engines=engines).inputs
    assert {tensor.name: (tensor.data_type, tensor.dims, how_it_comes(tensor)) for tensor in found} == expected


def test_every_output_is_upstreams(tiny_spec) -> None:
    expected = {name: (kind, dims) for name, kind, dims, _ in upstream(OUTPUTS)}
    assert {tensor.name: (tensor.data_type, tensor.dims) for tensor in config_of(tiny_spec).outputs} == expected


def test_every_parameter_is_one_that_the_backend_reads_and_those_without_default_are_there(tiny_spec) -> None:
    config = config_of(tiny_spec)
    given = {key for key, _ in config.parameters} | set(config.left_empty)
    assert given <= set(PARAMETERS.split())
    assert given >= WITHOUT_DEFAULT


def test_the_frame_is_upstreams(tiny_spec) -> None:
    config = config_of(tiny_spec)
    assert (config.backend, config.decoupled, config.instances) == ("tensorrtllm", True, 1)
    assert config.batching is not None
    assert (config.batching.preferred, config.batching.max_queue_size) == ((4,), 1024)
    assert "kind: KIND_CPU" in config_text(config)


def test_pictures_of_two_requests_cannot_meet_in_the_cache(tiny_spec) -> None:
    """Reuse is the backend's default; it waits for a run on a GPU with our extra ids."""
    assert config_of(tiny_spec).parameter("enable_kv_cache_reuse") == "false"


@pytest.mark.parametrize(
    ("max_num_tokens", "paged", "chunked"),
    [(512, True, "true"), (2048, True, "false"), (512, False, "false")],
    ids=["shorter than a prompt", "as long as any prompt", "engines that cannot"],
)
def test_prompts_come_in_pieces_only_where_they_must_and_can(tiny_spec, max_num_tokens, paged, chunked) -> None:
    config = config_of(
        tiny_spec,
        max_seq_len=2048,
        max_num_tokens=max_num_tokens,
        engines=EngineChoices(4096, 0.9, paged),
    )
    assert config.parameter("enable_chunked_context") == chunked


def test_the_cache_holds_what_was_planned(tiny_spec) -> None:
    config = config_of(tiny_spec, engines=EngineChoices(kv_tokens=130_112, kv_share_of_free=0.9))
    assert config.parameter("max_tokens_in_paged_kv_cache") == "130112"
