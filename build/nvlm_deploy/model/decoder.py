"""The Qwen2 decoder in torch, with Hugging Face's parameter names and a linear layer that can be swapped for FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional

from nvlm_deploy.model.fp8 import to_e4m3, widened
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec
from nvlm_deploy.model.vision import JointRmsNorm, require_shapes

if TYPE_CHECKING:
    from nvlm_deploy.checkpoint.reader import Checkpoint

PREFIX = "language_model."


class LayerCache(Protocol):
    """Keys and values of earlier tokens of one layer."""

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [batch, kv_heads, new, head_size]; return all there are, [batch, kv_heads, total, head_size]."""
        ...


# (name in the layer or `lm_head`, input width, output width, bias) -> the module that multiplies
LinearFactory = Callable[[str, int, int, bool], nn.Module]


def plain_linear(_name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """torch's own linear layer, whatever the name."""
    return nn.Linear(inputs, outputs, bias=bias)


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions (NeoX halves); biases on q, k, v only.

    With `key_scale` and `value_scale` (float32 scalars) the KV cache is FP8: it is given e4m3 codes, and every query,
    also one of the same pass, sees keys and values as the cache has them. With `qkv_proj` (rows: all q, all k, all v)
    that stands in for the three; see model.fused.
    """

    def __init__(self, spec: DecoderSpec, linear: LinearFactory) -> None:
        super().__init__()
        query_width, kv_width = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        self.head_size = spec.head_size
        self.heads, self.kv_heads = spec.heads, spec.kv_heads
        self.grouped = spec.heads != spec.kv_heads
        self.q_proj = linear("self_attn.q_proj", spec.hidden_size, query_width, True)
        self.k_proj = linear("self_attn.k_proj", spec.hidden_size, kv_width, True)
        self.v_proj = linear("self_attn.v_proj", spec.hidden_size, kv_width, True)
        self.o_proj = linear("self_attn.o_proj", query_width, spec.hidden_size, False)
        self.qkv_proj: nn.Module | None = None
        self.register_buffer("key_scale", None)
        self.register_buffer("value_scale", None)
        self.key_scale: torch.Tensor | None
        self.value_scale: torch.Tensor | None

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        q, k, v = self._projected(x, rotary)
        k, v = _cached(k, self.key_scale), _cached(v, self.value_scale)
        if cache is not None:
            k, v = cache.update(k, v)
        k, v = _seen(k, self.key_scale, q.dtype), _seen(v, self.value_scale, q.dtype)
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        projected: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return projected

    def _projected(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each [batch, its heads, tokens, head_size]; queries and keys rotated."""
        if self.qkv_proj is None:
            q, k, v = (self._by_head(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
            return rotate(q, *rotary), rotate(k, *rotary), v
        together, v = self._by_head(self.qkv_proj(x)).split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(together, *rotary).split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        by_head: torch.Tensor = x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return by_head


def _cached(states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What goes into the cache."""
    return states if scale is None else to_e4m3(states, scale)


def _seen(states: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What attention makes of that which the cache returned."""
    if scale is None:
        return states.to(dtype)
    values = widened(states) if states.dtype == torch.float8_e4m3fn else states.float()
    return (values * scale).to(dtype)


class DecoderMlp(nn.Module):
    """down(silu(gate(x)) * up(x)). In a TensorRT-LLM checkpoint gate is called `fc` and up is called `gate`.

    With `gate_up_proj` (rows: all of gate, all of up) that stands in for the two; see model.fused.
    """

    def __init__(self, spec: DecoderSpec, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear("mlp.gate_proj", spec.hidden_size, spec.intermediate_size, False)
        self.up_proj = linear("mlp.up_proj", spec.hidden_size, spec.intermediate_size, False)
        self.down_proj = linear("mlp.down_proj", spec.intermediate_size, spec.hidden_size, False)
        self.gate_up_proj: nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        hidden: torch.Tensor = self.down_proj(functional.silu(gate) * up)
        return hidden


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, spec: DecoderSpec, linear: LinearFactory = plain_linear) -> None:
        super().__init__()
        self.input_layernorm = JointRmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = DecoderAttention(spec, linear)
        self.post_attention_layernorm = JointRmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = DecoderMlp(spec, linear)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x [batch, tokens, hidden]; mask True where a query may look, [batch, 1, tokens, keys].

        No mask means causal from the first token on, so a cache that holds earlier tokens needs one.
        """
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        hidden: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return hidden


class DecoderBody(nn.Module):
    """Embedding table, layers, final norm."""

    def __init__(self, spec: DecoderSpec, linear: LinearFactory) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, linear) for _ in range(spec.layers))
        self.norm = JointRmsNorm(spec.hidden_size, spec.norm_epsilon)


class Decoder(nn.Module):
    """Embeddings in, logits out; the caller places visual embeddings among those of the text."""

    def __init__(self, spec: DecoderSpec, linear: LinearFactory = plain_linear) -> None:
        super().__init__()
        self.spec = spec
        self.model = DecoderBody(spec, linear)
        self.lm_head = linear("lm_head", spec.hidden_size, spec.vocab_size, False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def has_fp8_kv_cache(self) -> bool:
        """Whether caches are given e4m3 codes."""
        return any(part.key_scale is not None for part in self.modules() if isinstance(part, DecoderAttention))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [..., tokens] -> [..., tokens, hidden]."""
        embeddings: torch.Tensor = self.model.embed_tokens(ids)
        return embeddings

    def hidden_states(
        self,
        embeddings: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        caches: list[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Last layer's output after the final norm, [batch, tokens, hidden].

        embeddings [batch, tokens, hidden]; positions [batch, tokens], 0.. when None; mask as DecoderLayer's; one
        cache per layer.
        """
        if positions is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        rotary = rotary_tables(positions, self.spec, embeddings.dtype)
        hidden = embeddings
        for index, layer in enumerate(self.model.layers):
            hidden = layer(hidden, rotary, mask, None if caches is None else caches[index])
        normed: torch.Tensor = self.model.norm(hidden)
        return normed

    def forward(
        self,
        embeddings: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        caches: list[LayerCache] | None = None,
    ) -> torch.Tensor:
        """Logits [batch, tokens, vocab]."""
        hidden = self.hidden_states(embeddings, positions=positions, mask=mask, caches=caches)
        logits: torch.Tensor = self.lm_head(hidden)
        return logits


def rotary_tables(positions: torch.Tensor, spec: DecoderSpec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [batch, 1, tokens, head_size], computed in float32."""
    exponents = torch.arange(0, spec.head_size, 2, device=positions.device, dtype=torch.float32) / spec.head_size
    angles = positions[:, None, :, None].float() * (spec.rotary_base**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, tokens, head_size], halves convention (rope_gpt_neox)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def decoder_from_checkpoint(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder with the checkpoint's weights, for inference. Raises NvlmError for missing or misshapen tensors."""
    with torch.device("meta"):
        decoder = Decoder(spec.decoder)
    require_shapes(decoder, checkpoint, prefix=PREFIX)
    weights = {name: checkpoint.tensor(PREFIX + name).to(dtype) for name in decoder.state_dict()}
    decoder.load_state_dict(weights, assign=True)
    return decoder.requires_grad_(False).eval()
