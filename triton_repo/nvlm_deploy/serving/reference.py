"""The reference decoder as the scheduler's engine: a slotted KV cache makes one forward pass of many sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.decoder import Decoder, LayerCache
from nvlm_deploy.serving.kv_cache import SlottedKvCache

# Attention over more keys that are masked gives the same bits where both numbers of keys are multiples of this: torch's
# kernels sum in vectors of 16. So an answer does not depend on how long its neighbours are.
SAME_BITS = 16


class ReferenceEngine:
    """The scheduler's engine on a torch decoder. Raises NvlmError for a cache of another kind than the decoder's."""

    def __init__(self, decoder: Decoder, cache: SlottedKvCache) -> None:
        _require_holds(cache, decoder)
        self.decoder = decoder
        self.cache = cache
        self.slots = cache.slots
        self._lengths = [0] * self.slots
        self._replay: DecodeReplay | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One short sequence: torch sets its kernels up at their first use. On a GPU decoding is recorded as well."""
        self.prefill(0, [0, 0], None)
        self.decode([0], [0])
        self.release(0)
        if self.decoder.device.type == "cuda":
            self._replay = DecodeReplay(self)

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Sequence[int], table: torch.Tensor | None) -> torch.Tensor:
        """Logits [vocab] after the whole prompt."""
        embeddings = prompt_embeddings(self.decoder, torch.tensor(prompt, device=self.decoder.device), table)
        hidden = self.decoder.hidden_states(embeddings[None], caches=self.cache.prefill_views(slot))
        self._lengths[slot] = len(prompt)
        return self._logits(hidden[0, -1])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Logits [sequences, vocab]; the batch is one forward pass."""
        if self._replay is None:
            lengths = [self._lengths[slot] for slot in slots]
            positions = torch.tensor(lengths, device=self.decoder.device)
            total = min(-(-(max(lengths) + 1) // SAME_BITS) * SAME_BITS, self.cache.max_seq_len)
            views = self.cache.decode_views(slots, positions, total)
            logits = self.step(torch.tensor(tokens, device=self.decoder.device), positions, views, total)
        else:
            logits = self._replay.run(slots, tokens, self._lengths)
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, views: list[LayerCache], total: int) -> torch.Tensor:
        """Logits [sequences, vocab] after one token each [sequences], at `positions` below `total`."""
        reachable = torch.arange(total, device=positions.device) <= positions[:, None]
        hidden = self.decoder.hidden_states(
            self.decoder.embed(tokens[:, None]),
            positions=positions[:, None],
            mask=reachable[:, None, None],
            caches=views,
        )
        return self._logits(hidden[:, -1])

    def release(self, slot: int) -> None:
        """Free the slot for the next sequence."""
        self.cache.clear(slot, self._lengths[slot])
        self._lengths[slot] = 0

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder.lm_head(hidden).float()
        return logits


class DecodeReplay:
    """One decoding step of all slots over the whole cache: shapes never change, so a GPU can replay its launches.

    A slot that is not asked for computes something into the place where its own next token will go, which nobody reads.
    Recording and replaying were NOT RUN: no GPU was at hand; on a CPU `run` computes the same step directly, for tests.
    """

    def __init__(self, engine: ReferenceEngine) -> None:
        self.engine = engine
        self.tokens = torch.zeros(engine.slots, dtype=torch.long, device=engine.decoder.device)
        self.positions = torch.zeros_like(self.tokens)
        self.total = engine.cache.max_seq_len
        self.views = engine.cache.decode_views(range(engine.slots), self.positions, self.total)
        self.graph = self._recorded() if self.tokens.is_cuda else None

    def run(self, slots: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Logits of `slots` after one token each; `lengths` are those of every slot."""
        every = [0] * self.engine.slots
        for slot, token in zip(slots, tokens, strict=True):
            every[slot] = token
        self.tokens.copy_(torch.tensor(every))
        self.positions.copy_(torch.tensor([min(length, self.total - 1) for length in lengths]))
        if self.graph is None:
            self.logits = self._step()
        else:
            self.graph.replay()
        return self.logits[list(slots)]

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """torch wants the step run on another stream before it is recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._step()
        return graph

    def _step(self) -> torch.Tensor:
        return self.engine.step(self.tokens, self.positions, self.views, self.total)


def _require_holds(cache: SlottedKvCache, decoder: Decoder) -> None:
    if cache.dtype == torch.float8_e4m3fn and not decoder.has_fp8_kv_cache:
        raise NvlmError(
            "the KV cache is FP8, the decoder checkpoint has no kv_cache_scaling_factor",
            hint='set kv_cache = "fp8" in the profile and build the decoder again',
        )


def prompt_embeddings(decoder: Decoder, ids: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """Embeddings [tokens, hidden]: id `vocab_size + n` is row n of `table` (contract C.1).

    Raises NvlmError when an id refers to a row that the table does not have.
    """
    vocab_size = decoder.spec.vocab_size
    visual = ids >= vocab_size
    rows = 0 if table is None else table.shape[0]
    if bool(visual.any()) and int(ids.max()) - vocab_size >= rows:
        raise NvlmError(f"input_ids refer to row {int(ids.max()) - vocab_size} of a prompt table with {rows} rows")
    embeddings = decoder.embed(ids.masked_fill(visual, 0))
    if table is not None:
        embeddings[visual] = table.to(ids.device)[ids[visual] - vocab_size].to(embeddings.dtype)
    return embeddings
