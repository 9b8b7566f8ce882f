"""The preflight's findings against fake containers in which one thing is wrong; in a real one it has not run yet."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_deploy.checkpoint.trtllm_layout import Layout, Parallelism
from nvlm_deploy.llm import preflight as module
from nvlm_deploy.llm.preflight import Preflight, emitted_flags, preflight, standard_layouts
from nvlm_deploy.machine.resources import Gpu

FAKES = Path(__file__).parent / "fakes"
if str(FAKES) not in sys.path:
    sys.path.insert(0, str(FAKES))

from fake_container import FakeContainer  # noqa: E402

# Contract B, table and lists, word for word: every flag of trtllm-build at 1.0 to 1.2.1
_CONTRACT = """
--checkpoint_dir --model_config --build_config --model_cls_file --model_cls_name --output_dir --max_batch_size
--max_input_len --max_seq_len --max_decoder_seq_len --max_beam_width --max_num_tokens --opt_num_tokens
--max_encoder_input_len --max_prompt_embedding_table_size --max_multimodal_len --kv_cache_type --input_timing_cache
--output_timing_cache --profiling_verbosity --strip_plan --weight_sparsity --weight_streaming --fast_build --dry_run
--monitor_memory --enable_debug_output --visualize_network --workers --log_level --logits_dtype --gather_context_logits
--gather_generation_logits --gather_all_token_logits --lora_dir --lora_target_modules --max_lora_rank
--speculative_decoding_mode --max_draft_len --gpt_attention_plugin --bert_attention_plugin --gemm_plugin
--gemm_swiglu_plugin --fp8_rowwise_gemm_plugin --low_latency_gemm_plugin --low_latency_gemm_swiglu_plugin
--gemm_allreduce_plugin --lora_plugin --dora_plugin --moe_plugin --mamba_conv1d_plugin --nccl_plugin --context_fmha
--bert_context_fmha_fp32_acc --remove_input_padding --tokens_per_block --use_paged_context_fmha --use_fp8_context_fmha
--fuse_fp4_quant --multiple_profiles --paged_state --streamingllm --norm_quant_fusion --reduce_fusion --user_buffer
--use_fused_mlp --pp_reduce_scatter
"""
CONTRACT_FLAGS = _CONTRACT.split()


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeContainer:
    monkeypatch.setattr(module, "visible_gpus", lambda: (Gpu("NVIDIA H100 80GB HBM3", "9.0", "0"),))
    return FakeContainer(tmp_path, monkeypatch)


def few_layouts() -> dict[str, Layout]:
    names = ("BF16 TP 1 PP 1", "FP8 TP 2 PP 1")
    return {name: layout for name, layout in standard_layouts().items() if name in names}


def wrong(report: Preflight) -> dict[str, str]:
    assert all(finding.fix for finding in report.findings if not finding.passed)
    assert not any(finding.fix for finding in report.findings if finding.passed)
    return {finding.check: finding.found for finding in report.findings if not finding.passed}


def test_a_right_container_passes_for_every_recipe_and_split(container):
    report = preflight(standard_layouts())
    assert wrong(report) == {}
    assert report.passed
    checks = {finding.check for finding in report.findings}
    assert {"trtllm-build", "import tensorrt_llm", "import tensorrt", "tritonserver", "GPU", "flags"} <= checks
    assert "config.json FP8 + FP8 KV TP 2 PP 1" in checks
    assert "tensors FP8_PER_CHANNEL_PER_TOKEN TP 16 PP 1 rank 15" in checks
    assert "tensors FP8 TP 2 PP 2 rank 3" in checks


def test_a_report_is_one_document(container):
    report = preflight(few_layouts())
    document = json.loads(json.dumps(report.as_json()))
    assert document["passed"] is True
    assert document["findings"][0]["check"] == "trtllm-build"
    assert set(document["findings"][0]) == {"check", "passed", "found", "fix"}


def test_a_machine_that_is_no_container_gets_one_finding_with_the_containers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    report = preflight(few_layouts())
    assert wrong(report) == {"trtllm-build": "no trtllm-build on PATH"}
    assert "26.07" in (report.findings[0].fix or "")


def test_another_release_is_named(container):
    container.version("0.20.0")
    assert "TensorRT-LLM 0.20.0 is installed" in wrong(preflight(few_layouts()))["trtllm-build"]


def test_a_tensorrt_of_another_release_is_named(container):
    container.tensorrt("10.11.0.33")
    assert wrong(preflight(few_layouts())) == {"import tensorrt": "tensorrt 10.11.0.33, expected 10.14.x"}


def test_a_container_tag_that_belongs_to_another_release_is_named(container):
    container.triton("25.12", "2.64.0")
    found = wrong(preflight(few_layouts()))
    assert list(found) == ["tritonserver"]
    assert "container 25.12" in found["tritonserver"]


def test_a_container_that_cannot_serve_is_named(container):
    (container.bin / "tritonserver").unlink()
    assert wrong(preflight(few_layouts())) == {"tritonserver": "no tritonserver on PATH"}


def test_no_gpu_is_a_finding(container, monkeypatch):
    monkeypatch.setattr(module, "visible_gpus", lambda: ())
    report = preflight(few_layouts())
    assert wrong(report) == {"GPU": "none is visible"}


def test_a_flag_that_is_gone_is_named(container):
    container.edit("tensorrt_llm/commands/build.py", ', "--max_multimodal_len"', "")
    container.edit("tensorrt_llm/commands/build.py", '    "use_fused_mlp": True,\n', "")
    found = wrong(preflight(few_layouts()))
    assert found == {"flags": "not in `trtllm-build --help`: --max_multimodal_len, --use_fused_mlp"}


def test_a_help_that_fails_is_said_in_its_words(container):
    container.script("trtllm-build", "raise RuntimeError('libnvinfer.so.10: cannot open shared object file')\n")
    found = wrong(preflight(few_layouts()))
    assert list(found) == ["flags"]
    assert "libnvinfer.so.10" in found["flags"]


@pytest.mark.parametrize("function", ["parallel_build", "build_and_save"])
def test_a_function_that_one_rank_alone_needs_and_that_changed_is_named(container, function):
    container.edit("tensorrt_llm/commands/build.py", f"def {function}(", f"def {function}(mesh=None, *, ")
    if function == "parallel_build":
        container.edit("tensorrt_llm/commands/build.py", "mesh=None, *, \n    model_config", "mesh, model_config")
    else:
        container.edit("tensorrt_llm/commands/build.py", "mesh=None, *, rank", "mesh, rank")
    found = wrong(preflight(few_layouts()))
    assert list(found) == [f"one rank alone: {function}"]
    assert f"{function}(mesh, " in found[f"one rank alone: {function}"]


def test_a_key_that_is_lost_or_changed_on_the_way_is_named(container):
    container.edit(
        "tensorrt_llm/models/modeling_utils.py",
        "        output = copy.deepcopy(self.__dict__)\n",
        "        output = {**copy.deepcopy(self.__dict__), 'rotary_base': 1e4}\n        del output['seq_length']\n",
    )
    found = wrong(preflight(few_layouts()))
    assert set(found) == {"config.json BF16 TP 1 PP 1", "config.json FP8 TP 2 PP 1"}
    said = found["config.json FP8 TP 2 PP 1"]
    assert "seq_length absent, ours 8192" in said
    assert "rotary_base 10000.0, ours 1000000.0" in said


def test_a_config_that_is_refused_is_said_in_tensorrt_llms_words(container):
    container.edit("tensorrt_llm/models/modeling_utils.py", "    exclude_modules: list | None = None\n", "")
    found = wrong(preflight(few_layouts()))
    assert "unexpected keyword argument 'exclude_modules'" in found["config.json BF16 TP 1 PP 1"]
    assert "unexpected keyword argument 'exclude_modules'" in found["tensors FP8 TP 2 PP 1 rank 1"]


def test_tensors_that_are_wanted_otherwise_are_named(container):
    container.edit("tensorrt_llm/models/network.py", '"mlp.gate"', '"mlp.up"')
    found = wrong(preflight(few_layouts()))
    said = found["tensors BF16 TP 1 PP 1 rank 0"]
    assert "transformer.layers.0.mlp.gate.weight is ours, nobody wants it" in said
    assert "transformer.layers.0.mlp.up.weight is wanted, we do not write it" in said
    assert "and 3 more" in said


def test_a_shape_or_type_that_is_wanted_otherwise_is_named(container):
    container.edit(
        "tensorrt_llm/models/network.py", "rows = -(-config.vocab_size // tensor)", "rows = 152192 // tensor"
    )
    found = wrong(preflight(few_layouts()))
    assert (
        "lm_head.weight is wanted as BF16 [76096, 8192], ours is BF16 [76032, 8192]"
        in found["tensors FP8 TP 2 PP 1 rank 0"]
    )


def test_a_library_that_crashes_takes_only_the_probe_with_it(container):
    container.edit("tensorrt/__init__.py", "import os\n", "import os\n\nos.abort()\n")
    found = wrong(preflight(few_layouts()))
    assert "the probe ended with -6" in found["import tensorrt_llm"]
    assert "the probe ended with -6" in found["tensors FP8 TP 2 PP 1 rank 0"]


# --- the fake against the contract: what it imitates is what was written down


def test_every_flag_that_is_ever_emitted_is_one_of_the_contracts():
    assert emitted_flags() <= set(CONTRACT_FLAGS)
    assert len(emitted_flags()) > 20


def test_the_fakes_help_has_the_contracts_flags(container):
    help_text = subprocess.run([container.executable, "--help"], capture_output=True, text=True, check=True).stdout
    assert set(CONTRACT_FLAGS) <= set(re.findall(r"--[a-z][a-z0-9_]*", help_text))


@pytest.mark.parametrize("program", ["engine_one_rank.py", "preflight_probe.py"])
def test_programs_for_the_containers_python_import_nothing_of_ours(program):
    tree = ast.parse(Path(module.__file__).with_name(program).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_a_stage_has_the_tensors_of_its_layers_only():
    layout = standard_layouts()["FP8 TP 2 PP 2"]
    assert layout.parallelism == Parallelism(2, 2)
    assert [sum("input_layernorm" in name for name in layout.rank_tensors(rank)) for rank in range(4)] == [2, 2, 1, 1]
