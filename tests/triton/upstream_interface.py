"""What TensorRT-LLM's own config.pbtxt says of its C++ backend's tensors: the facts, not its text.

Read in NVIDIA/TensorRT-LLM, triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt at commits
2a9abd95 and 0c8de69a, which agree in all of this (BSD-3-Clause, Copyright 2024 NVIDIA CORPORATION & AFFILIATES);
parameters at 2a9abd95. Columns: name, type, dims, and of inputs how they come to the backend: `value` is reshaped to no
axis, `ragged` may differ in length from request to request, `plain` is neither. A type in angle brackets is the
template's to fill in. All inputs are optional but the two that are marked.
"""

from __future__ import annotations

INPUTS = """
input_ids                           INT32   -1     ragged
encoder_input_features              <any>   -1,-1  ragged
encoder_output_lengths              INT32   1      value
input_lengths                       INT32   1      value   required
request_output_len                  INT32   1      value   required
num_return_sequences                INT32   1      value
draft_input_ids                     INT32   -1     ragged
decoder_input_ids                   INT32   -1     ragged
decoder_input_lengths               INT32   1      value
draft_logits                        <logits> -1,-1 ragged
draft_acceptance_threshold          FP32    1      value
end_id                              INT32   1      value
pad_id                              INT32   1      value
stop_words_list                     INT32   2,-1   ragged
bad_words_list                      INT32   2,-1   ragged
embedding_bias                      FP32    -1     ragged
beam_width                          INT32   1      value
temperature                         FP32    1      value
runtime_top_k                       INT32   1      value
runtime_top_p                       FP32    1      value
runtime_top_p_min                   FP32    1      value
runtime_top_p_decay                 FP32    1      value
runtime_top_p_reset_ids             INT32   1      value
len_penalty                         FP32    1      value
early_stopping                      BOOL    1      value
repetition_penalty                  FP32    1      value
min_tokens                          INT32   1      value
beam_search_diversity_rate          FP32    1      value
presence_penalty                    FP32    1      value
frequency_penalty                   FP32    1      value
seed                                UINT64  1      value
return_log_probs                    BOOL    1      value
return_context_logits               BOOL    1      value
return_generation_logits            BOOL    1      value
return_perf_metrics                 BOOL    1      value
return_num_input_tokens             BOOL    1      value
return_num_output_tokens            BOOL    1      value
exclude_input_in_output             BOOL    1      value
stop                                BOOL    1      value
streaming                           BOOL    1      value
prompt_embedding_table              <table> -1,-1  ragged
prompt_table_extra_ids              UINT64  -1     ragged
prompt_vocab_size                   INT32   1      value
cross_attention_mask                BOOL    -1,-1  ragged
mrope_rotary_cos_sin                FP32    -1     plain
mrope_position_deltas               INT64   1      plain
lora_task_id                        UINT64  1      value
lora_weights                        FP16    -1,-1  ragged
lora_config                         INT32   -1,3   ragged
context_phase_params                UINT8   -1     ragged
skip_cross_attn_blocks              BOOL    1      ragged
retention_token_range_starts        INT32   -1     ragged
retention_token_range_ends          INT32   -1     ragged
retention_token_range_priorities    INT32   -1     ragged
retention_token_range_durations_ms  INT32   -1     ragged
retention_decode_priority           INT32   1      ragged
retention_decode_duration_ms        INT32   1      ragged
guided_decoding_guide_type          STRING  1      ragged
guided_decoding_guide               STRING  1      ragged
lookahead_window_size               INT32   1      ragged
lookahead_ngram_size                INT32   1      ragged
lookahead_verification_set_size     INT32   1      ragged
"""

OUTPUTS = """
output_ids                   INT32    -1,-1
sequence_length              INT32    -1
cum_log_probs                FP32     -1
output_log_probs             FP32     -1,-1
context_logits               <logits> -1,-1
generation_logits            <logits> -1,-1,-1
batch_index                  INT32    1
sequence_index               INT32    1
context_phase_params         UINT8    -1
kv_cache_alloc_new_blocks    INT32    1
kv_cache_reused_blocks       INT32    1
kv_cache_alloc_total_blocks  INT32    1
arrival_time_ns              INT64    1
first_scheduled_time_ns      INT64    1
first_token_time_ns          INT64    1
last_token_time_ns           INT64    1
acceptance_rate              FP32     1
total_accepted_draft_tokens  INT32    1
total_draft_tokens           INT32    1
num_input_tokens             INT32    1
num_output_tokens            INT32    1
"""

PARAMETERS = """
max_beam_width FORCE_CPU_ONLY_INPUT_TENSORS gpt_model_type gpt_model_path encoder_model_path
max_tokens_in_paged_kv_cache max_attention_window_size sink_token_length batch_scheduler_policy
kv_cache_free_gpu_mem_fraction cross_kv_cache_fraction kv_cache_host_memory_bytes kv_cache_onboard_blocks
exclude_input_in_output cancellation_check_period_ms stats_check_period_ms iter_stats_max_iterations
request_stats_max_iterations enable_kv_cache_reuse normalize_log_probs enable_chunked_context gpu_device_ids
participant_ids num_nodes lora_cache_optimal_adapter_size lora_cache_max_adapter_size lora_cache_gpu_memory_fraction
lora_cache_host_memory_bytes lora_prefetch_dir decoding_mode executor_worker_path lookahead_window_size
lookahead_ngram_size lookahead_verification_set_size medusa_choices eagle_choices gpu_weights_percent
enable_context_fmha_fp32_acc multi_block_mode cuda_graph_mode cuda_graph_cache_size speculative_decoding_fast_logits
tokenizer_dir guided_decoding_backend xgrammar_tokenizer_info_path
"""
# read by model_instance_state.cc (0c8de69a, c8c6df08) outside of a try: a model without one of them does not load
WITHOUT_DEFAULT = {
    "gpt_model_type",
    "tokenizer_dir",
    "guided_decoding_backend",
    "xgrammar_tokenizer_info_path",
}
