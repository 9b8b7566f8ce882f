"""The model `tensorrt_llm`: TensorRT-LLM's C++ backend, or the reference decoder behind the very same interface.

Names, types, dims, ragged and reshaped inputs are those of the config.pbtxt that comes with TensorRT-LLM
(triton_backend/all_models/inflight_batcher_llm/tensorrt_llm), parameters those that its backend reads
(triton_backend/inflight_batcher_llm/src/model_instance_state.cc; contract C.3).
"""

from __future__ import annotations

from nvlm_deploy import tensors
from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.tensors import TensorSpec
from nvlm_deploy.triton.choices import EngineChoices, ServingChoices
from nvlm_deploy.triton.pbtxt import DynamicBatching, ModelConfig, TensorConfig, text_parameters

DECODER = "tensorrt_llm"
BACKEND = "tensorrtllm"
VERSION = "1"
# the backend takes this path as it is: relative to the server's working folder, which is the repository
ENGINE_FOLDER = f"{DECODER}/{VERSION}"
# single values that keep their axis, and are ragged, and inputs of neither kind
_RAGGED_VALUES = {
    "skip_cross_attn_blocks",
    "retention_decode_priority",
    "retention_decode_duration_ms",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
    "lookahead_window_size",
    "lookahead_ngram_size",
    "lookahead_verification_set_size",
}
_PLAIN = {"mrope_rotary_cos_sin", "mrope_position_deltas"}
# read without a default: a model without them does not load
_MUST_BE_THERE = ("guided_decoding_backend", "tokenizer_dir", "xgrammar_tokenizer_info_path")
_EXECUTOR_WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"


def decoder_config(spec: ModelSpec, choices: ServingChoices) -> ModelConfig:
    """Complete, for either decoder."""
    engines = choices.engines
    # the reference decoder makes text as well, which needs more than the C++ backend has
    further_inputs, further_outputs = ((tensors.STOP_TEXTS,), tensors.TEXT_OUTPUTS) if engines is None else ((), ())
    return ModelConfig(
        name=DECODER,
        backend="python" if engines is None else BACKEND,
        max_batch_size=choices.max_batch_size,
        inputs=tuple(
            _input(tensor.with_axes(hidden=spec.decoder.hidden_size))
            for tensor in (*tensors.DECODER_INPUTS, *further_inputs)
        ),
        outputs=tuple(TensorConfig.from_spec(tensor) for tensor in (*tensors.DECODER_OUTPUTS, *further_outputs)),
        parameters=text_parameters(
            _reference_parameters(choices) if engines is None else _engine_parameters(choices, engines)
        ),
        decoupled=True,
        batching=DynamicBatching() if engines is None else _batching(choices),
        left_empty=() if engines is None else _MUST_BE_THERE,
    )


def _batching(choices: ServingChoices) -> DynamicBatching:
    """The backend takes the queue's bound for its own; zero is not known to mean that there is none."""
    return DynamicBatching(max_queue_size=choices.max_waiting_requests, preferred=(choices.max_batch_size,))


def _input(tensor: TensorSpec) -> TensorConfig:
    """A single value comes without its axis; what has a length of its own may have another in each request."""
    is_value = tensor.axes == (1,) and tensor.name not in _RAGGED_VALUES | _PLAIN
    config = TensorConfig.from_spec(tensor, ragged=not is_value and tensor.name not in _PLAIN)
    return config.reshaped(()) if is_value else config


def _reference_parameters(choices: ServingChoices) -> dict[str, object]:
    return {
        "max_batch_size": choices.max_batch_size,
        "max_seq_len": choices.max_seq_len,
        "max_num_tokens": choices.max_num_tokens,
        "max_waiting_requests": choices.max_waiting_requests,
        "compute_dtype": choices.compute_dtype,
        "kv_cache_dtype": choices.kv_cache_dtype,
        "threads": choices.threads,
    }


def _engine_parameters(choices: ServingChoices, engines: EngineChoices) -> dict[str, object]:
    """Ranks find one another and their GPUs by MPI; the KV cache's type is in the engines.

    Reuse of the KV cache is off, which is not the backend's default: what keeps two pictures apart in it, extra ids of
    exactly the prompt's length (contract C.2), has not been seen to work on a GPU yet.
    """
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": ENGINE_FOLDER,
        "executor_worker_path": _EXECUTOR_WORKER,
        "num_nodes": 1,
        "max_beam_width": 1,
        "decoding_mode": "top_k_top_p",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "max_tokens_in_paged_kv_cache": engines.kv_tokens,
        "kv_cache_free_gpu_mem_fraction": engines.kv_share_of_free,
        "enable_kv_cache_reuse": False,
        "enable_chunked_context": engines.paged_context and choices.max_num_tokens < choices.max_seq_len,
        "exclude_input_in_output": True,
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    }
