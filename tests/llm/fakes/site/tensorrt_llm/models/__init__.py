"""Architecture names that are Qwen's (contract A.2)."""

from __future__ import annotations

from .network import QWenForCausalLM

MODEL_MAP = dict.fromkeys(("QWenForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"), QWenForCausalLM)
