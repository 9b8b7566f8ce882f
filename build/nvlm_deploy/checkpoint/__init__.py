"""Shards in and out by tensor name; the TensorRT-LLM checkpoint format."""
