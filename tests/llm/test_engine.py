"""Engines by trtllm-build: what is asked, in how many processes, what is made of deaths, and the read-back.

TensorRT-LLM cannot run here: a fake, written after the contract (fakes/README.md), stands in. It shows our side only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvlm_deploy.checkpoint.trtllm import checkpoint_writer
from nvlm_deploy.checkpoint.trtllm_config import config_from_layout
from nvlm_deploy.checkpoint.trtllm_layout import Layout, Parallelism
from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.llm import engine_tool
from nvlm_deploy.llm.engine import (
    BuildPlaces,
    EngineSettings,
    dry_run,
    engines_from_checkpoint,
    plan_engines,
    rank_commands,
    rank_memory_bytes,
)
from nvlm_deploy.llm.engine_arguments import EngineLimits, engine_arguments, engine_limits
from nvlm_deploy.llm.engine_config import differences, expected_config
from nvlm_deploy.llm.engine_tool import RELEASES, interpreter_of, release_of
from nvlm_deploy.machine.resources import Gpu, Machine
from nvlm_deploy.model.spec import DecoderSpec, TilingSpec
from nvlm_deploy.sku import load_sku

FAKES = Path(__file__).parent / "fakes"
if str(FAKES) not in sys.path:
    sys.path.insert(0, str(FAKES))

from fake_container import FakeContainer  # noqa: E402

SMALL = DecoderSpec(13, 16, 24, 3, 4, 2, 1e-6, 1e6, 64)
RELEASED = DecoderSpec(152064, 8192, 29568, 80, 64, 8, 1e-6, 1e6, 32768)
TILING = TilingSpec(448, 1, 6, True, 256)
H100 = load_sku("h100-sxm-80gb")
LIMITS = EngineLimits(4, 64, 256, 48)
LARGE = 1 << 40


def gpus(count: int) -> tuple[Gpu, ...]:
    return tuple(Gpu("NVIDIA H100 80GB HBM3", "9.0", str(index)) for index in range(count))


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeContainer:
    folder = tmp_path / "container"
    folder.mkdir()
    return FakeContainer(folder, monkeypatch)


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    return EngineSettings(H100, LIMITS, tmp_path / "cache")


@pytest.fixture
def engine_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    folder.mkdir()
    return folder


def written(folder: Path, layout: Layout) -> Path:
    """A checkpoint of zeros."""
    import torch

    types = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    folder.mkdir()
    with checkpoint_writer(folder, layout) as writer:
        for tensor in layout.tensors:
            writer.put(tensor, torch.zeros(tensor.shape).to(types[tensor.dtype]))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two ranks."""
    return written(tmp_path / "decoder", Layout(SMALL, "FP8", Parallelism(2)))


@pytest.fixture
def checkpoint_of_four(tmp_path: Path) -> Path:
    return written(tmp_path / "decoder", Layout(SMALL, "FP8", Parallelism(4)))


def arguments_of(config: dict[str, Any], **changes: Any) -> dict[str, str]:
    sku = changes.pop("sku", H100)
    return {argument.flag: argument.value for argument in engine_arguments(config, sku, LIMITS)}


def config_with(quant_algo: str | None, kv_cache: str | None = None) -> dict[str, Any]:
    config = config_from_layout(Layout(SMALL))
    return {**config, "quantization": {"quant_algo": quant_algo, "kv_cache_quant_algo": kv_cache}}


# --- what is asked


def test_the_prompt_table_has_room_for_the_most_pictures_of_every_request_in_a_batch():
    """The contract's practice: 2 requests of 26 tiles of 256 tokens are 13312 rows."""
    tiling = dataclasses.replace(TILING, max_tiles=26, use_thumbnail=False)
    limits = engine_limits(tiling, max_batch_size=2, max_seq_len=32768, max_images=1)
    assert limits.prompt_table_rows == 13312
    assert limits.prompt_table_rows // limits.max_batch_size == 26 * 256
    with_thumbnail = engine_limits(TILING, max_batch_size=8, max_seq_len=32768, max_images=16)
    assert with_thumbnail.prompt_table_rows == 8 * 16 * 7 * 256


def test_visual_tokens_that_no_sequence_could_hold_get_no_room():
    limits = engine_limits(TILING, max_batch_size=8, max_seq_len=4100, max_images=16)
    assert limits.visual_tokens == 4096
    with pytest.raises(NvlmError, match="max_seq_len 255 is shorter than one tile of 256 visual tokens"):
        engine_limits(TILING, max_batch_size=8, max_seq_len=255, max_images=1)


@pytest.mark.parametrize(
    ("max_batch_size", "max_seq_len", "chosen", "expected"),
    [
        (8, 32768, None, 32768),
        (8, 4096, None, 8192),
        (1, 4096, None, 4096),
        (8, 32768, 16384, 16384),
        (8, 512, None, 4096),
    ],
)
def test_tokens_of_one_step_hold_any_prompt_and_are_never_more_than_trtllm_build_would_leave(
    max_batch_size, max_seq_len, chosen, expected
):
    limits = engine_limits(
        TILING, max_batch_size=max_batch_size, max_seq_len=max_seq_len, max_images=1, max_num_tokens=chosen
    )
    assert limits.max_num_tokens == expected


@pytest.mark.parametrize(
    ("quant_algo", "kv_cache", "paged", "fp8_attention"),
    [
        (None, None, "enable", "disable"),
        ("FP8", None, "enable", "disable"),
        ("FP8", "FP8", "enable", "enable"),
        ("FP8_PER_CHANNEL_PER_TOKEN", None, "enable", "disable"),
    ],
)
def test_fp8_attention_is_asked_only_with_fp8_linears_and_an_fp8_cache(quant_algo, kv_cache, paged, fp8_attention):
    flags = arguments_of(config_with(quant_algo, kv_cache))
    assert (flags["--use_paged_context_fmha"], flags["--use_fp8_context_fmha"]) == (paged, fp8_attention)
    assert flags["--context_fmha"] == flags["--remove_input_padding"] == "enable"


@pytest.mark.parametrize("quant_algo", [None, "FP8_PER_CHANNEL_PER_TOKEN"])
def test_an_fp8_cache_without_fp8_attention_has_no_paged_context_and_so_no_chunks(quant_algo):
    config = config_with(quant_algo, "FP8")
    assert arguments_of(config)["--use_paged_context_fmha"] == "disable"
    with pytest.raises(NvlmError, match="max_num_tokens 32 is less than max_seq_len 64") as refusal:
        engine_arguments(config, H100, dataclasses.replace(LIMITS, max_num_tokens=32))
    assert 'kv_cache = "16bit"' in (refusal.value.hint or "")
    engine_arguments(config_with("FP8", "FP8"), H100, dataclasses.replace(LIMITS, max_num_tokens=32))


@pytest.mark.parametrize(
    ("quant_algo", "gemm", "fused_mlp"),
    [(None, "bfloat16", "enable"), ("FP8", "disable", "enable"), ("FP8_PER_CHANNEL_PER_TOKEN", "disable", "disable")],
)
def test_plugins_follow_the_quantisation(quant_algo, gemm, fused_mlp):
    flags = arguments_of(config_with(quant_algo))
    assert (flags["--gemm_plugin"], flags["--use_fused_mlp"]) == (gemm, fused_mlp)
    assert flags["--gpt_attention_plugin"] == "bfloat16"


@pytest.mark.parametrize("flag", ["--auto_parallel", "--gpus_per_node", "--cluster_key", "--reduce_fusion"])
def test_flags_that_newer_releases_lack_or_that_do_nothing_for_qwen_are_not_given(flag):
    assert flag not in arguments_of(config_with("FP8"))


@pytest.mark.parametrize(
    ("sku", "quant_algo", "reason"),
    [
        ("cpu", None, "SKU 'cpu' has no GPU"),
        ("a100-80gb", "FP8", r"a100-80gb \(compute capability 8\.0\) has no FP8"),
        ("b200", "FP8_PER_CHANNEL_PER_TOKEN", r"builds no FP8_PER_CHANNEL_PER_TOKEN for b200"),
    ],
)
def test_what_a_gpu_cannot_run_is_refused_before_any_build(sku, quant_algo, reason):
    with pytest.raises(NvlmError, match=reason) as refusal:
        engine_arguments(config_with(quant_algo), load_sku(sku), LIMITS)
    assert refusal.value.hint


@pytest.mark.parametrize("tokens", [31, 257])
def test_tokens_of_one_step_that_trtllm_build_would_change_are_refused(tokens):
    with pytest.raises(NvlmError, match=rf"max_num_tokens {tokens} is not between 32 .* and 256 "):
        engine_arguments(config_with("FP8"), H100, dataclasses.replace(LIMITS, max_num_tokens=tokens))


# --- commands to paste


def test_a_single_rank_is_built_by_trtllm_build_itself(tmp_path, settings):
    plan = plan_engines(Layout(SMALL, "FP8"), H100, LIMITS)
    (command,) = rank_commands(plan, tmp_path / "a checkpoint", tmp_path / "out", settings)
    assert command.argv[0] == "trtllm-build"
    assert shlex.split(command.shell) == list(command.argv)
    assert f"'{tmp_path}/a checkpoint'" in command.shell
    assert command.argv[command.argv.index("--workers") + 1] == "1"


def test_a_dry_run_says_one_command_for_each_rank_and_what_it_needs(tmp_path, settings):
    plan = plan_engines(Layout(RELEASED, "FP8", Parallelism(2)), H100, LIMITS)
    lines = dry_run(plan, BuildPlaces(tmp_path / "decoder", tmp_path / "engines"), settings).splitlines()
    assert lines[0].startswith("# 2 rank(s), each thought to need ")
    assert lines[1].startswith("mkdir -p ")
    assert [shlex.split(line)[3] for line in lines[2:4]] == ["0", "1"]
    assert "trtllm-1.2.1-h100" in lines[2], "a version that a container has, no word in its place"
    assert "trtllm-build --checkpoint_dir" in lines[4]
    assert lines[4].startswith("#")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_to_paste_are_those_that_build(container, checkpoint, engine_folder, settings, monkeypatch):
    """A shell runs them, with the fake trtllm-build on PATH and its Python under the name they use."""
    (container.bin / "python3").symlink_to(sys.executable)
    plan = plan_engines(Layout(SMALL, "FP8", Parallelism(2)), H100, LIMITS)
    script = dry_run(plan, BuildPlaces(checkpoint, engine_folder), settings)
    path = os.pathsep.join([os.environ["PATH"], "/usr/bin", "/bin"])  # mkdir is no part of the fake container
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PATH": path}
    done = subprocess.run(["/bin/sh", "-e", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"config.json", "rank0.engine", "rank1.engine"} <= {path.name for path in engine_folder.iterdir()}


# --- memory


def test_a_rank_is_thought_to_need_three_times_its_weights_and_four_gib():
    """The released decoder in FP8: 70.0 GB of linears, 2.5 GB each of embeddings and head."""
    one, two = (rank_memory_bytes(Layout(RELEASED, "FP8", Parallelism(ranks))) for ranks in (1, 2))
    assert one == pytest.approx(3 * 75.2e9 + (4 << 30), rel=0.01)
    assert two == pytest.approx(one / 2 + (2 << 30), rel=0.01)


@pytest.mark.parametrize(("ranks_that_fit", "cards", "expected"), [(4, 4, 4), (3.9, 4, 3), (0.5, 4, 1), (9, 2, 2)])
def test_as_many_ranks_at_once_as_memory_and_gpus_allow(ranks_that_fit, cards, expected):
    plan = plan_engines(Layout(SMALL, "FP8", Parallelism(4)), H100, LIMITS)
    assert plan.at_once(Machine(int(ranks_that_fit * plan.rank_bytes), gpus(cards))) == expected


# --- building


@pytest.mark.slow
@pytest.mark.parametrize(
    "split", [Parallelism(1), Parallelism(2), Parallelism(4), Parallelism(2, 2), Parallelism(1, 3)]
)
@pytest.mark.parametrize("quant_algo", [None, "FP8"])
def test_every_rank_becomes_an_engine_in_a_process_of_its_own(
    container, tmp_path, engine_folder, settings, quant_algo, split
):
    checkpoint = written(tmp_path / "decoder", Layout(SMALL, quant_algo, split))
    built = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(4)))
    assert [build.rank for build in built.ranks] == list(range(split.world_size))
    for rank in range(split.world_size):
        assert json.loads((engine_folder / f"rank{rank}.engine").read_text())["rank"] == rank
        log = (engine_folder / f"rank{rank}.log").read_text()
        assert log.startswith("$ CUDA_VISIBLE_DEVICES=")
        assert f"[I] rank {rank} on device 0" in log
        assert f"[I] rank {rank + 1} on" not in log
    assert built.config["pretrained_config"]["vocab_size"] == 13
    assert built.config["build_config"]["max_prompt_embedding_table_size"] == 4 * 48
    assert built.notes["attempts"] == [1] * split.world_size
    assert min(built.notes["peak_host_bytes"]) > 1 << 20


@pytest.mark.parametrize(
    ("quant_algo", "kv_cache"),
    [("FP8", "FP8"), ("FP8_PER_CHANNEL_PER_TOKEN", None), ("FP8_PER_CHANNEL_PER_TOKEN", "FP8")],
)
def test_every_recipe_comes_back_as_it_was_asked(container, tmp_path, engine_folder, settings, quant_algo, kv_cache):
    """The fake overrides what the real one overrides: asking for it would fail here as it would there."""
    layout = Layout(SMALL, quant_algo, Parallelism(2), kv_cache)
    checkpoint = written(tmp_path / "decoder", layout)
    built = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    quantization = built.config["pretrained_config"]["quantization"]
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == (quant_algo, kv_cache)


def spans(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.engine"))]


def most_at_once(folder: Path) -> int:
    found = spans(folder)
    return max(sum(other["started"] <= one["started"] < other["ended"] for other in found) for one in found)


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "most"), [(None, 4), (2, 2), (1, 1)])
def test_ranks_run_together_on_gpus_of_their_own_and_no_more_than_asked(
    container, checkpoint_of_four, engine_folder, settings, at_once, most
):
    container.orders(sleep_s=0.7)
    settings = dataclasses.replace(settings, at_once=at_once)
    engines_from_checkpoint(checkpoint_of_four, engine_folder, settings, machine=Machine(LARGE, gpus(4)))
    assert most_at_once(engine_folder) == most
    for one in spans(engine_folder):
        others = [other for other in spans(engine_folder) if other is not one and other["rank"] != one["rank"]]
        together = [other for other in others if other["started"] < one["ended"] and one["started"] < other["ended"]]
        assert one["device"] not in {other["device"] for other in together}


@pytest.mark.slow
@pytest.mark.parametrize("code", [None, 137])
def test_a_rank_killed_for_lack_of_memory_is_built_again_with_fewer_at_once(
    container, checkpoint_of_four, engine_folder, settings, caplog, code
):
    container.orders(killed={"2": 1}, sleep_s=0.3, **({} if code is None else {"code": code}))
    built = engines_from_checkpoint(checkpoint_of_four, engine_folder, settings, machine=Machine(LARGE, gpus(4)))
    assert built.notes["attempts"][2] == 2
    assert "rank 2 was killed, mostly for lack of memory; again with 2 at a time" in caplog.text
    assert "Serialising" in (engine_folder / "rank2-attempt1.log").read_text()
    assert "Serialising" not in (engine_folder / "rank2.log").read_text()
    assert len(spans(engine_folder)) == 4


@pytest.mark.slow
def test_ranks_that_were_finished_are_not_built_again(container, checkpoint_of_four, engine_folder, settings):
    container.orders(killed={"3": 2}, sleep_s=0.2)
    built = engines_from_checkpoint(checkpoint_of_four, engine_folder, settings, machine=Machine(LARGE, gpus(4)))
    assert built.notes["attempts"] == [1, 1, 1, 3]
    assert sorted(path.name for path in engine_folder.glob("rank3*.log")) == [
        "rank3-attempt1.log",
        "rank3-attempt2.log",
        "rank3.log",
    ]


def test_a_rank_that_is_killed_alone_is_the_machines_fault_with_what_it_needs(
    container, checkpoint, engine_folder, settings
):
    container.orders(killed={"1": 9})
    with pytest.raises(MachineError, match=r"was killed at rank 1, which was built alone[\s\S]*Serialising") as death:
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    assert "dmesg" in (death.value.hint or "")
    assert "one rank is thought to need 4 GiB" in (death.value.hint or "")
    assert (settings.cache_folder / "trtllm-build-rank1-failed.log").is_file()


def test_a_rank_that_fails_is_said_in_its_own_words_and_the_others_are_stopped(
    container, checkpoint, engine_folder, settings
):
    container.orders(fails=[1], say="no kernel for SM 73", sleep_s=0)
    with pytest.raises(MachineError, match=r"exit code 1 at rank 1[\s\S]*RuntimeError: no kernel for SM 73") as failure:
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    assert "nvlm doctor --container" in (failure.value.hint or "")
    kept = settings.cache_folder / "trtllm-build-rank1-failed.log"
    assert kept.read_text() == (engine_folder / "rank1.log").read_text()
    assert not [child for child in psutil.Process().children() if "rank" in " ".join(child.cmdline())]


def test_a_gpu_out_of_memory_is_told_from_host_memory(container, checkpoint, engine_folder, settings):
    container.orders(fails=[0], say="Error Code 2: OutOfMemory (Requested size was 33555480576 bytes.)")
    with pytest.raises(MachineError) as failure:
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(1)))
    assert "the GPU's memory" in (failure.value.hint or "")


def test_success_without_an_engine_is_a_failure(container, checkpoint, engine_folder, settings):
    container.orders(forgets=[1])
    with pytest.raises(MachineError, match=r"ended well but wrote no rank1\.engine at rank 1"):
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(1)))


def test_too_little_memory_is_said_and_one_rank_is_tried(container, checkpoint, engine_folder, settings, caplog):
    built = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(1 << 30, gpus(2)))
    assert "needs 4 GiB" not in caplog.text
    assert "one rank is thought to need 4 GiB of host memory, 1 GiB are free: the build may be killed" in caplog.text
    assert len(built.ranks) == 2


# --- going on after a kill


def test_a_killed_build_keeps_the_ranks_it_finished(container, checkpoint, engine_folder, settings):
    machine = Machine(LARGE, gpus(1))
    container.orders(fails=[1], say="power cut")
    with pytest.raises(MachineError, match="power cut"):
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    first = (engine_folder / "rank0.engine").stat().st_mtime_ns
    container.orders()
    built = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    assert (engine_folder / "rank0.engine").stat().st_mtime_ns == first
    assert "power cut" in (engine_folder / "rank1-attempt1.log").read_text()
    assert len(built.ranks) == 2


def test_ranks_of_another_release_or_that_were_cut_short_are_built_again(
    container, checkpoint, engine_folder, settings
):
    machine = Machine(LARGE, gpus(1))
    engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    (engine_folder / "rank1.engine").write_text("cut")
    engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    assert json.loads((engine_folder / "rank1.engine").read_text())["rank"] == 1
    container.version("1.2.0")
    built = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    assert built.config["version"] == built.version == "1.2.0"


def test_a_builder_left_behind_by_a_killed_run_is_not_written_over(container, checkpoint, engine_folder, settings):
    program = "import fcntl, sys, time; fcntl.flock(sys.stdout, fcntl.LOCK_EX); print('x', flush=True); time.sleep(60)"
    with (engine_folder / "rank0.log").open("wb") as log:
        orphan = subprocess.Popen([sys.executable, "-c", program], stdout=log)
    try:
        while not (engine_folder / "rank0.log").stat().st_size:
            time.sleep(0.01)
        with pytest.raises(MachineError, match=r"a process of an earlier run still writes .*rank0\.log") as refusal:
            engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(1)))
        assert "fuser" in (refusal.value.hint or "")
    finally:
        orphan.kill()
        orphan.wait()


@pytest.mark.slow
def test_a_child_holds_the_lock_of_its_log_after_its_parents_death(
    container, checkpoint, engine_folder, settings, tmp_path
):
    """The parent is killed in the middle; its child sleeps on and holds the lock."""
    container.orders(sleep_s=30)
    program = f"""
from pathlib import Path
from nvlm_deploy.llm.engine import EngineLimits, EngineSettings, Machine, engines_from_checkpoint
from nvlm_deploy.machine.resources import Gpu
from nvlm_deploy.sku import load_sku

settings = EngineSettings(load_sku("h100-sxm-80gb"), EngineLimits(4, 64, 256, 48), Path({str(settings.cache_folder)!r}))
machine = Machine(1 << 40, (Gpu("x", "9.0", "0"),))
engines_from_checkpoint(Path({str(checkpoint)!r}), Path({str(engine_folder)!r}), settings, machine=machine)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    log = engine_folder / "rank0.log"
    while not (log.exists() and psutil.Process(parent.pid).children()):
        assert parent.poll() is None
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        with pytest.raises(MachineError, match="still writes"):
            engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(1)))
    finally:
        for child in children:
            child.kill()
    psutil.wait_procs(children, timeout=10)
    container.orders()
    assert len(engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(1))).ranks) == 2


@pytest.mark.slow
def test_an_interrupt_stops_the_children(container, checkpoint, engine_folder, settings):
    container.orders(sleep_s=30)
    children: list[psutil.Process] = []
    others = psutil.Process().children()  # a server of other tests, say

    def interrupted(*_: object) -> None:
        children.extend(child for child in psutil.Process().children() if child not in others)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(children) == 2
    assert not [child for child in children if child.is_running()]


# --- timing cache


def test_kernel_times_are_kept_by_release_and_gpu_and_never_read_while_they_are_written(
    container, checkpoint, engine_folder, settings
):
    machine, cache = Machine(LARGE, gpus(2)), settings.cache_folder / "trtllm-1.2.1-h100-sxm-80gb.cache"
    first = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    assert first.timing_cache_sha256 is None
    assert cache.read_bytes() == b"+"
    assert not (engine_folder / "timing.cache").exists()
    settings = dataclasses.replace(settings, limits=dataclasses.replace(LIMITS, max_batch_size=5))
    second = engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)
    assert second.timing_cache_sha256 is not None
    assert cache.read_bytes() == b"++"


# --- the read-back


@pytest.mark.parametrize(
    ("field", "value", "asked"),
    [
        ("build_config.max_batch_size", 2, 4),
        ("build_config.max_seq_len", 32, 64),
        ("build_config.max_num_tokens", 128, 256),
        ("build_config.max_prompt_embedding_table_size", 0, 192),
        ("build_config.kv_cache_type", "CONTINUOUS", "PAGED"),
        ("build_config.plugin_config.gemm_plugin", "bfloat16", None),
        ("build_config.plugin_config.use_fp8_context_fmha", True, False),
        ("build_config.plugin_config.use_paged_context_fmha", False, True),
        ("build_config.plugin_config.use_paged_context_fmha", 1, True),
        ("pretrained_config.rotary_base", 10000.0, 1000000.0),
        ("pretrained_config.mapping.tp_size", 1, 2),
        ("pretrained_config.quantization.quant_algo", None, "FP8"),
        ("pretrained_config.quantization.exclude_modules", None, ["lm_head"]),
        ("version", "1.1.0", "1.2.1"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_is_refused_naming_the_field(
    container, checkpoint, engine_folder, settings, field, value, asked
):
    container.orders(changes={field: value})
    with pytest.raises(MachineError) as refusal:
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    assert f"{field} is {value!r}, asked was {asked!r}" in refusal.value.message


def test_a_field_that_is_gone_and_several_that_differ_are_all_said():
    expected = expected_config("1.2.1", {"vocab_size": 13}, engine_arguments(config_with("FP8"), H100, LIMITS))
    found = {
        "version": "1.2.1",
        "pretrained_config": {},
        "build_config": {**expected["build_config"], "max_seq_len": 1},
    }
    said = [str(difference) for difference in differences(expected, found)]
    assert said == [
        "pretrained_config.vocab_size is absent, asked was 13",
        "build_config.max_seq_len is 1, asked was 64",
    ]


def test_what_the_tool_says_besides_is_its_own_business():
    assert not list(differences({"a": {"b": 1}}, {"a": {"b": 1, "more": 2}, "more": 3}))


def test_every_choice_is_read_back():
    arguments = engine_arguments(config_with("FP8"), H100, LIMITS)
    build_config = expected_config("1.2.1", {}, arguments)["build_config"]
    plugins = build_config.pop("plugin_config")
    assert len(build_config) + len(plugins) == len(arguments)


# --- which trtllm-build


@pytest.mark.parametrize("version", ["1.0.0", "1.0.3", "1.1.0", "1.1.1", "1.2.0", "1.2.1"])
def test_the_cohorts_versions_are_known(version):
    assert release_of(version).tensorrt


@pytest.mark.parametrize("version", ["0.20.0", "0.9.0", "1.2.2", "1.3.0", "1.2.0rc3", "1.20.1", "2.0.0"])
def test_other_versions_are_refused_by_name_with_the_containers_that_have_a_right_one(
    container, checkpoint, engine_folder, settings, version
):
    container.version(version)
    with pytest.raises(
        MachineError, match=rf"TensorRT-LLM {version} is installed; .*1\.0\.x, 1\.1\.x, 1\.2\.0, 1\.2\.1"
    ) as no:
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    for release in RELEASES:
        assert all(tag in (no.value.hint or "") for tag in release.containers)
    assert list(engine_folder.iterdir()) == []


def test_a_machine_without_trtllm_build_is_told_which_container_has_it(
    checkpoint, engine_folder, settings, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="no trtllm-build on PATH") as refusal:
        engines_from_checkpoint(checkpoint, engine_folder, settings)
    assert "26.07" in (refusal.value.hint or "")
    assert "-trtllm-python-py3" in (refusal.value.hint or "")


def test_a_trtllm_build_without_its_package_is_said(container, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(MachineError, match=r"has no tensorrt_llm: .*PackageNotFoundError"):
        engine_tool.installed_tool()


@pytest.mark.parametrize(
    ("first_line", "expected"),
    [
        ("#!{python}", "{python}"),
        ("#!/usr/bin/env python3", "python3"),
        ("#!/usr/bin/env -S python3 -s", "python3"),
        ("#!/bin/sh", "python3"),
    ],
)
def test_the_tools_own_python_is_found_in_its_first_line(container, first_line, expected):
    (container.bin / "python3").symlink_to(sys.executable)
    script = container.bin / "script"
    script.write_text(first_line.format(python=sys.executable) + "\n")
    found = interpreter_of(script)
    assert found == (sys.executable if "{" in expected else str(container.bin / "python3"))


def test_a_script_of_a_python_that_is_not_there_is_said(container):
    (container.bin / "script").write_text("#!/opt/gone/bin/python3\n")
    with pytest.raises(MachineError, match="wants the Python '/opt/gone/bin/python3'"):
        interpreter_of(container.bin / "script")


def test_another_gpu_than_the_skus_is_refused(container, checkpoint, engine_folder, settings):
    machine = Machine(LARGE, (Gpu("NVIDIA L40S", "8.9", "0"),))
    with pytest.raises(NvlmError, match=r"NVIDIA L40S \(compute capability 8\.9\), the profile's SKU h100"):
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=machine)


def test_a_machine_without_a_gpu_is_refused(container, checkpoint, engine_folder, settings):
    with pytest.raises(MachineError, match="no GPU here"):
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, ()))


def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_runs(container, checkpoint, engine_folder, settings):
    (checkpoint / "rank1.safetensors").unlink()
    with pytest.raises(NvlmError, match=r"no rank1\.safetensors"):
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
    assert list(engine_folder.iterdir()) == []


def test_the_program_of_one_rank_says_so_when_a_release_has_no_place_for_it(
    container, checkpoint, engine_folder, settings
):
    container.edit("tensorrt_llm/commands/build.py", "parallel_build(", "build_in_parallel(")
    with pytest.raises(MachineError, match="has no parallel_build: this TensorRT-LLM cannot build one rank alone"):
        engines_from_checkpoint(checkpoint, engine_folder, settings, machine=Machine(LARGE, gpus(2)))
