"""What an operator chooses about serving."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_deploy.image_file.opening import AS_VIEWED
from nvlm_deploy.image_file.reading import ImageReading


@dataclass(frozen=True)
class EngineChoices:
    """Of TensorRT-LLM's engines: `kv_tokens` are what the KV cache holds, on the rank that has least room for it, and
    `kv_share_of_free` what it takes at most of the memory that is free when the engine is there.

    `paged_context` is whether the engines can take a prompt in pieces.
    """

    kv_tokens: int
    kv_share_of_free: float
    paged_context: bool = True


@dataclass(frozen=True)
class ServingChoices:
    """All lengths in tokens. Without `engines` the reference decoder stands where TensorRT-LLM would."""

    max_batch_size: int = 8
    max_seq_len: int = 1024
    max_images: int = 16
    default_max_tokens: int = 128
    prompt_wrapper: str = "chat"
    max_num_tokens: int = 8192
    max_waiting_requests: int = 1024
    max_request_bytes: int = 128 * 2**20
    max_waiting_bytes: int = 512 * 2**20
    images: ImageReading = AS_VIEWED
    vision_runtime: str = "onnxruntime"
    max_tiles_per_run: int = 16
    compute_dtype: str = "float32"
    kv_cache_dtype: str = "float32"
    threads: int = 1
    preprocessing_instances: int = 2
    preprocessing_threads: int = 2
    engines: EngineChoices | None = None
