"""Checkpoints that every room's tests share: random weights in the small model's shapes, and the trained model."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).parent / "models"
CLIENT = Path(__file__).parent / "client"  # both_clients.py is for tests of other folders, too
for scripts in (MODELS, CLIENT):  # folders of scripts that import one another
    if str(scripts) not in sys.path:
        sys.path.insert(0, str(scripts))

# a shell that starts us in the background has SIGINT ignored, and every child would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["core_selection"]

CheckpointMaker = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """config.json of the small model: the released keys and quirks."""
    from folder import config

    return config()


@pytest.fixture(scope="session")
def tiny_spec(tiny_config):
    """The small model's ModelSpec: 4 vision heads, padded with 7 dummies to 11."""
    from nvlm_deploy.model.spec import spec_from_config

    return spec_from_config(tiny_config, padded_heads=11)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    from tokenizer import write_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tiny_config, tokenizer_file) -> CheckpointMaker:
    """Writes a checkpoint of random weights in the released layout and opens it.

    `vision_layers` and `decoder_layers` shrink it; `edit` may change the dict of tensors before it is written.
    """

    def make(*, vision_layers: int = 4, decoder_layers: int = 4, edit: Callable[..., None] | None = None):
        from nvlm_deploy.checkpoint.reader import Checkpoint
        from nvlm_deploy.checkpoint.writer import write_shards
        from nvlm_deploy.model.spec import spec_from_config

        folder = tmp_path_factory.mktemp("random_checkpoint")
        config = json.loads(json.dumps(tiny_config))
        config["vision_config"]["num_hidden_layers"] = vision_layers
        config["llm_config"]["num_hidden_layers"] = decoder_layers
        weights = random_weights(spec_from_config(config, padded_heads=11))
        if edit is not None:
            edit(weights)
        write_shards(folder, weights.items(), max_shard_bytes=2_800_000)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
        return Checkpoint.open(folder)

    return make


@pytest.fixture(scope="session")
def random_checkpoint(make_checkpoint):
    """The small model's shapes with random BF16 weights and 7 zero dummy heads, in 3 shards. Do not write to it."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def traced_once() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """In this context a stage of the same shape is traced once in a session; not for tests of the tracing itself.

    Tracing is nine tenths of a small model's export.
    """
    from nvlm_deploy.vision import trace

    traced, done = trace.traced_stage, {}

    def once(stage: Any, spec: Any, dtype: Any) -> Any:
        vision = replace(spec.vision, layers=1)
        key = (stage.kind, vision, spec.projector, spec.tiling.tile_size, spec.decoder.hidden_size, dtype)
        if key not in done:
            done[key] = traced(stage, spec, dtype)
        model = done[key].clone()
        for value in model.graph.initializers.values():
            value.type = copy(value.type)  # a clone shares it, and quantise_block changes it
        return model

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(trace, "traced_stage", once)
            yield

    return context


@pytest.fixture(scope="session")
def exported_vision(random_checkpoint, tmp_path_factory, traced_once) -> Path:
    """vision.onnx of `random_checkpoint` in float32. Do not write to it."""
    from nvlm_deploy.model.spec import spec_from_checkpoint
    from nvlm_deploy.vision.export import onnx_from_checkpoint

    folder = tmp_path_factory.mktemp("exported") / "vision"
    with traced_once():
        return onnx_from_checkpoint(
            random_checkpoint, spec_from_checkpoint(random_checkpoint), folder, precision="fp32"
        )


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The trained small model."""
    folder = MODELS / "nvlm-d-tiny"
    if not (folder / "model.safetensors.index.json").is_file():
        pytest.skip("tests/models/nvlm-d-tiny is not trained yet (tests/models/train.py)")
    return folder


def random_weights(spec):
    """BF16 tensors by checkpoint name; every one matters to the result, none makes it explode."""
    import torch

    from nvlm_deploy.model.decoder import PREFIX, Decoder
    from nvlm_deploy.model.vision import VisionTower

    with torch.device("meta"):
        shapes = {PREFIX + name: weight.shape for name, weight in Decoder(spec.decoder).state_dict().items()}
        shapes |= {name: w.shape for name, w in VisionTower(spec.vision, spec.projector).state_dict().items()}
    noise = torch.Generator().manual_seed(0)
    weights = {name: _random_tensor(name, torch.randn(shape, generator=noise)) for name, shape in shapes.items()}
    _zero_dummy_heads(weights, spec.vision.hidden_size)
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def _random_tensor(name: str, noise):
    if name.endswith("bias"):
        return 0.2 * noise
    if noise.ndim == 1:
        return 1 + 0.2 * noise
    if "embed_tokens" in name or name.endswith(("class_embedding", "position_embedding")):
        return noise
    return noise / noise[0].numel() ** 0.5


def _zero_dummy_heads(weights, real: int) -> None:
    for name, weight in weights.items():
        if name.endswith("attn.qkv.weight"):
            weight.view(3, -1, real)[:, real:] = 0
        elif name.endswith(("attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight")):
            weight[..., real:] = 0
