"""The command trtllm-build: flags and defaults of contract B, and what it does with them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tensorrt_llm.models import MODEL_MAP
from tensorrt_llm.models.modeling_utils import PretrainedConfig

NUMBERS = {
    "max_batch_size": 2048,
    "max_input_len": 1024,
    "max_beam_width": 1,
    "max_num_tokens": 8192,
    "opt_num_tokens": None,
    "max_encoder_input_len": 1024,
    "workers": 1,
    "max_lora_rank": 64,
    "max_draft_len": 0,
    "tokens_per_block": 32,
}
TEXTS = (
    "checkpoint_dir",
    "model_config",
    "build_config",
    "model_cls_file",
    "model_cls_name",
    "input_timing_cache",
    "visualize_network",
    "lora_dir",
    "lora_target_modules",
    "speculative_decoding_mode",
)
FLAGS = (
    "strip_plan",
    "weight_sparsity",
    "weight_streaming",
    "fast_build",
    "dry_run",
    "monitor_memory",
    "enable_debug_output",
    "gather_context_logits",
    "gather_generation_logits",
    "gather_all_token_logits",
)
TYPES = ["auto", "float16", "float32", "bfloat16", "int32", "disable"]
PLUGINS = {
    "bert_attention_plugin": ("auto", TYPES),
    "gpt_attention_plugin": ("auto", TYPES),
    "gemm_plugin": (None, [*TYPES, "fp8", "nvfp4"]),
    "gemm_swiglu_plugin": ("disable", ["fp8", "disable"]),
    "fp8_rowwise_gemm_plugin": ("disable", TYPES),
    "low_latency_gemm_plugin": ("disable", ["fp8", "disable"]),
    "low_latency_gemm_swiglu_plugin": ("disable", ["fp8", "disable"]),
    "gemm_allreduce_plugin": ("disable", ["float16", "bfloat16", "disable"]),
    "lora_plugin": ("disable", TYPES),
    "moe_plugin": ("auto", TYPES),
    "mamba_conv1d_plugin": ("auto", TYPES),
    "nccl_plugin": ("auto", TYPES),
}
SWITCHES = {
    "context_fmha": True,
    "bert_context_fmha_fp32_acc": False,
    "remove_input_padding": True,
    "use_paged_context_fmha": True,
    "use_fp8_context_fmha": True,
    "fuse_fp4_quant": False,
    "multiple_profiles": False,
    "paged_state": True,
    "streamingllm": False,
    "norm_quant_fusion": False,
    "reduce_fusion": False,
    "user_buffer": False,
    "use_fused_mlp": True,
    "pp_reduce_scatter": False,
    "dora_plugin": False,
}


def parse_arguments():
    parser = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in TEXTS:
        parser.add_argument(f"--{name}", default=None)
    for name in FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", type=int, default=None)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    parser.add_argument("--output_dir", default="engine_outputs")
    parser.add_argument("--output_timing_cache", default="model.cache")
    parser.add_argument("--kv_cache_type", choices=["continuous", "paged", "disabled"], default="paged")
    parser.add_argument("--profiling_verbosity", choices=["layer_names_only", "detailed", "none"])
    parser.add_argument("--log_level", default="info")
    parser.add_argument("--logits_dtype", choices=["float16", "float32"])
    for name, (default, choices) in PLUGINS.items():
        parser.add_argument(f"--{name}", default=default, choices=choices)
    for name, on in SWITCHES.items():
        parser.add_argument(f"--{name}", default="enable" if on else "disable", choices=["enable", "disable"])
    return parser


def parallel_build(
    model_config, ckpt_dir, build_config, output_dir, workers=1, log_level="info", model_cls=None, **kwargs
):
    for rank in range(model_config.mapping.world_size):
        build_and_save(rank, rank % workers, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls)


def build_and_save(rank, gpu_id, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs):
    orders = json.loads(os.environ.get("FAKE_TRTLLM", "{}"))
    print(f"[TRT-LLM] [I] rank {rank} on device {gpu_id} of CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
    started = time.time()
    time.sleep(orders.get("sleep_s", 0))
    die_if_told(orders, rank)
    if rank in orders.get("fails", []):
        raise RuntimeError(orders["say"])
    model_config.set_rank(rank)
    load(model_config, ckpt_dir)
    engine = Path(output_dir) / f"rank{rank}.engine"
    engine.parent.mkdir(parents=True, exist_ok=True)
    overridden(build_config, model_config)
    if rank == 0:
        config = {"version": version("tensorrt_llm"), "pretrained_config": model_config.to_dict()}
        write_config(engine.with_name("config.json"), {**config, "build_config": build_config}, orders)
        Path(build_config["output_timing_cache"]).write_bytes(timing_cache(build_config) + b"+")
    if rank not in orders.get("forgets", []):
        span = {"rank": rank, "started": started, "ended": time.time(), "device": os.environ["CUDA_VISIBLE_DEVICES"]}
        engine.write_text(json.dumps(span))
    return True


def timing_cache(build_config):
    path = build_config["input_timing_cache"]
    return Path(path).read_bytes() if path and Path(path).exists() else b""


def die_if_told(orders, rank):
    """So often as told, counted in a folder that outlives the process."""
    times = orders.get("killed", {}).get(str(rank), 0)
    count = Path(os.environ.get("FAKE_TRTLLM_STATE", "/nonexistent")) / f"deaths-of-{rank}"
    if times and int(count.read_text() if count.exists() else 0) < times:
        count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))
        print("[TRT] [I] Serialising", flush=True)
        if "code" in orders:
            os._exit(orders["code"])
        os.kill(os.getpid(), signal.SIGKILL)


def load(config, folder):
    """As the real `load`: a required tensor that is not there is an error, one too many only a warning."""
    path = Path(folder) / f"rank{config.mapping.rank}.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    model = MODEL_MAP[config.architecture](config)
    required = {name for name, parameter in model.named_parameters() if not parameter.is_inited()}
    required = {name for name in required if not name.endswith("kv_cache_rcp_scaling_factor")}  # made by the loader
    if required - header.keys():
        raise RuntimeError(f"Required but not provided tensors:{required - header.keys()}")


def overridden(build_config, config):
    """What `build()` changes with a warning (contract B, "Logic that matters")."""
    plugins, quantization = build_config["plugin_config"], config.quantization
    fp8_kv = quantization.kv_cache_quant_algo == "FP8"
    if quantization.quant_algo != "FP8":
        plugins["use_fp8_context_fmha"] = False
        if fp8_kv:
            plugins["use_paged_context_fmha"] = False
    elif plugins["use_paged_context_fmha"]:
        plugins["use_fp8_context_fmha"] = fp8_kv
    most = build_config["max_seq_len"] * build_config["max_batch_size"]
    build_config["max_num_tokens"] = min(build_config["max_num_tokens"], most)
    build_config["max_input_len"] = min(build_config["max_input_len"], build_config["max_seq_len"])


def write_config(path, config, orders):
    for field, value in orders.get("changes", {}).items():
        *sections, name = field.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[name] = value
    path.write_text(json.dumps(config, indent=4))


def main():
    args = vars(parse_arguments().parse_args())
    on_off = {"enable": True, "disable": None}
    plugins = {name: on_off.get(args[name], args[name]) for name in PLUGINS}
    plugins |= {name: args[name] == "enable" for name in SWITCHES}
    plugins["tokens_per_block"] = args["tokens_per_block"]
    names = ("max_input_len", "max_seq_len", "max_batch_size", "max_beam_width", "max_num_tokens", "opt_num_tokens")
    build_config = {name: args[name] for name in (*names, "max_prompt_embedding_table_size")}
    build_config |= {"kv_cache_type": args["kv_cache_type"].upper(), "strongly_typed": True, "plugin_config": plugins}
    build_config |= {name: args[name] for name in ("input_timing_cache", "output_timing_cache")}
    config = PretrainedConfig.from_json_file(Path(args["checkpoint_dir"]) / "config.json")
    parallel_build(config, args["checkpoint_dir"], build_config, args["output_dir"], args["workers"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
