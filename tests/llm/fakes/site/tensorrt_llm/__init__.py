"""A fake TensorRT-LLM (see ../../README.md)."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("tensorrt_llm")
print(f"[TensorRT-LLM] TensorRT-LLM version: {__version__}")  # as the real one does at import, on stdout
