"""What is left of a server's log: what went wrong, and nothing that it always says. Lines of tritonserver 2.51."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm_deploy.triton.server_log import TAIL_LINES, ServerLog

NO_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"
ALWAYS = f"""\
W1126 21:41:24.617083 15176 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory: {NO_DRIVER}"
I1126 21:41:24.617137 15176 cuda_memory_manager.cc:117] "CUDA memory pool disabled"
E1126 21:41:24.617204 15176 server.cc:241] "CudaDriverHelper has not been initialized."
I1126 21:41:24.629915 13776 model_lifecycle.cc:472] "loading: postprocessing:1"
E1126 21:41:25.427810 13776 ensemble_scheduler.cc:1468] "unable to create stream for nvlm: {NO_DRIVER}"
+------------------+------+
| Repository Agent | Path |
+------------------+------+

Error: Failed to initialize NVML
W1126 21:41:25.481611 13776 metrics.cc:798] "DCGM unable to start: DCGM initialization error"
"""
LIFECYCLE = "E1126 21:41:29.074749 15176 model_lifecycle.cc:642]"
RAISED = (
    f"{LIFECYCLE} \"failed to load 'preprocessing' version 1: Internal: NvlmError: "
    '/tmp/x/repository/preprocessing/1/tokenizer.json is not readable\\n\\nAt:\\n  /a/prompt.py(139): _open\\n"\n'
)
DIED = (
    f"{LIFECYCLE} \"failed to load 'postprocessing' version 1: Internal: "
    "Stub process 'postprocessing_0_0' is not healthy.\"\n"
)
OUT_OF_MEMORY = (
    f"{LIFECYCLE} \"failed to load 'vision_encoder' version 1: Internal: "
    'OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"\n'
)


@pytest.fixture
def log(tmp_path: Path):
    def make(text: str, **options) -> ServerLog:
        (tmp_path / "log").write_text(text)
        return ServerLog(tmp_path / "log", **options)

    return make


def test_what_a_server_without_gpu_always_says_is_left_out(log) -> None:
    assert log(ALWAYS).tail() == ""


def test_a_server_that_needs_a_gpu_keeps_its_complaints(log) -> None:
    tail = log(ALWAYS, needs_gpu=True).tail()
    assert "CUDA driver version is insufficient" in tail
    assert "Failed to initialize NVML" in tail
    assert "loading:" not in tail and "+--" not in tail


def test_what_went_wrong_stays(log) -> None:
    tail = log(ALWAYS + RAISED + OUT_OF_MEMORY + "Segmentation fault (core dumped)\n").tail()
    assert tail.count("\n") == 3
    for telling in ("is not readable", "CUDA out of memory", "Segmentation fault"):
        assert telling in tail


def test_the_models_that_failed_are_named_with_triton_s_reason(log) -> None:
    assert log(ALWAYS + RAISED + DIED + OUT_OF_MEMORY).failed_models() == {
        "preprocessing": "NvlmError: /tmp/x/repository/preprocessing/1/tokenizer.json is not readable",
        "postprocessing": "Stub process 'postprocessing_0_0' is not healthy.",
        "vision_encoder": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
    }
    assert log(ALWAYS).failed_models() == {}


def test_a_link_is_shown_as_what_it_leads_to(log) -> None:
    linked = log(RAISED, links={Path("/tmp/x/repository"): Path("/srv/models")})
    assert linked.failed_models()["preprocessing"].split()[1] == "/srv/models/preprocessing/1/tokenizer.json"
    assert "/tmp/x" not in linked.tail()


def test_the_tail_is_short(log) -> None:
    tail = log("".join(f"{number} {'x' * 5000}\n" for number in range(100))).tail()
    assert tail.startswith("88 ")
    assert tail.count("\n") == TAIL_LINES
    assert max(map(len, tail.splitlines())) <= 400
