"""The decoder that runs a TensorRT-LLM checkpoint against transformers' Qwen2ForCausalLM, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_deploy.checkpoint.trtllm_layout import Parallelism
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.reference import decoder_from_trtllm


@pytest.mark.parametrize("parallelism", [Parallelism(1), Parallelism(4, 2)], ids=["one rank", "eight ranks"])
def test_an_unquantised_checkpoint_gives_transformers_logits(
    case: Any, tmp_path: Path, parallelism: Parallelism
) -> None:
    output = tmp_path / "decoder"
    trtllm_checkpoint_from(case.checkpoint, case.spec, output, calibration=None, parallelism=parallelism)
    decoder, peer = decoder_from_trtllm(output), case.peer()
    for sample in case.samples:
        with torch.no_grad():
            ours, theirs = decoder(sample[None]), peer(inputs_embeds=sample[None]).logits
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_its_embeddings_are_transformers_embeddings(case: Any, tmp_path: Path) -> None:
    trtllm_checkpoint_from(case.checkpoint, case.spec, tmp_path / "decoder", calibration=None)
    decoder = decoder_from_trtllm(tmp_path / "decoder")
    ids = torch.arange(case.spec.decoder.vocab_size)
    assert torch.equal(decoder.embed(ids), case.peer().get_input_embeddings()(ids))
