"""`nvlm plan`: the released model on every SKU, quickly and without heavy libraries; refusals; SLOs; 80 columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.cli import main
from nvlm_deploy.profile import load_profile, profile_folder, profile_names
from nvlm_deploy.sku import sku_names

ROOTS = [str(Path(__file__).parents[2] / root) for root in ("build", "triton_repo", "tools")]
HEAVY = ("torch", "onnx", "onnxruntime", "tritonclient", "transformers", "scipy")
# every profile in turn, each as the first thing after the imports, where no heavy library can be imported; seconds are
# of its own work, so that other programs do not count
LIGHT = f"""
import sys, time
started = time.process_time()
for name in {HEAVY!r}:
    sys.modules[name] = None
sys.path[:0] = {ROOTS!r}
import typer
from nvlm_deploy.cli import main, plan
app = typer.Typer(pretty_exceptions_enable=False)
app.callback()(lambda: None)
plan.register(app)
main.app = app
imported = time.process_time() - started
for profile in sys.argv[1:]:
    started = time.process_time()
    try:
        main.run(["plan", "--spec", "nvlm-d-72b", "-p", profile])
    except SystemExit as end:
        seconds = imported + time.process_time() - started
        print("RESULT", profile, end.code, seconds)
"""
MOST_SECONDS = 2.0


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def nvlm(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main.run(list(arguments))
    return int(exit_.value.code or 0)


def nvlm_plan(*arguments: str) -> int:
    return nvlm("plan", "--spec", "nvlm-d-72b", *arguments)


def a_profile_of(sku: str) -> str:
    return next(name for name in profile_names() if load_profile(name).sku == sku)


def test_every_sku_is_planned_in_two_seconds_without_heavy_libraries() -> None:
    profiles = [a_profile_of(sku) for sku in sku_names()]
    command = [sys.executable, "-c", LIGHT, *profiles]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("79.38 B parameters, 147.9 GiB in BF16") == len(profiles)
    found = {line.split()[1]: line.split()[2:] for line in result.stdout.splitlines() if line.startswith("RESULT")}
    assert {name: int(code) for name, (code, _) in found.items()} == {
        name: int(name.startswith("cpu")) for name in profiles
    }
    assert max(float(seconds) for _, seconds in found.values()) < MOST_SECONDS


@pytest.mark.parametrize("profile", profile_names())
def test_the_text_is_80_columns_wide_at_most(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    nvlm_plan("-p", profile)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


@pytest.mark.parametrize("columns", [20, 40, 60])
@pytest.mark.parametrize(
    "asked",
    [["-p", "h100-sxm-80gb-throughput", "--images", "9"], ["-p", "cpu"], ["--ttft-ms", "600"], ["--ttft-ms", "1"]],
)
def test_a_narrower_terminal_gets_no_longer_lines(
    asked: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    nvlm_plan(*asked)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= columns


def test_the_totals_are_those_of_the_fact_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("-p", "h100-sxm-80gb-throughput") == 0
    text = capsys.readouterr().out
    for found in (
        "79.38 B parameters, 147.9 GiB in BF16",
        "65.39 GiB of linears in FP8 + 4.64 GiB in BF16",
        "327,680 bytes a token in 16 bits, 163,840 in FP8",
    ):
        assert found in text


def test_every_number_of_the_text_has_an_origin(capsys: pytest.CaptureFixture[str]) -> None:
    nvlm_plan("-p", "h200-141gb-throughput")
    lines = capsys.readouterr().out.splitlines()
    memory = lines[next(i for i, line in enumerate(lines) if "origin" in line) + 2 :]
    rows = [line for line in memory[: next(i for i, line in enumerate(memory) if "KV cache:" in line)] if line.strip()]
    assert len(rows) > 10
    assert all(line.split()[-1] in ("derived", "published", "measured") for line in rows)
    for start in ("  TTFT", "  TPOT", "KV cache:", "  decoder"):
        assert any(line.startswith(start) and "derived" in line for line in lines), start
    assert any("preprocess (measured)" in line for line in lines)


@pytest.mark.parametrize(
    ("profile", "over_pcie"),
    [("l40s-throughput", True), ("h100-nvl-94gb-throughput", False), ("h200-141gb-throughput", False)],
)
def test_what_pcie_is_thought_to_reach_is_said_where_it_counts(
    profile: str, over_pcie: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    nvlm_plan("-p", profile)
    assert ("of PCIe's bandwidth between GPUs (published" in capsys.readouterr().out) == over_pcie


def test_a_pipeline_is_said_to_be_counted_stage_after_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for before, after, said in (
        ("tensor_parallel = 2", "tensor_parallel = 2", False),
        ("tensor_parallel = 2", "pipeline_parallel = 2", True),
    ):
        assert nvlm_plan("-p", own_profile(tmp_path, before, after)) == 0
        assert ("pipeline stages are counted one after another" in capsys.readouterr().out) == said


def test_json_has_every_number_with_its_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("-p", "h100-sxm-80gb-throughput", "--concurrency", "8", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    first = document["memory"][0]
    assert first["used_bytes"] == sum(line["size_bytes"] for line in first["lines"]) + first["kv_cache_bytes"]
    assert first["used_bytes"] <= first["visible_bytes"]
    assert {line["evidence"] for line in first["lines"]} <= {"derived", "published"}
    assert document["kv_cache"]["tokens"] % 32 == 0
    assert document["kv_cache"]["requests_of_workload"] >= 8
    assert [2, 1] in document["legal_splits"]
    stages = document["prediction"]["stages_s"]
    assert document["prediction"]["ttft_s"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))
    assert {"preprocess", "wait", "vision", "prefill", "first token"} == set(stages)
    assert {step["name"] for step in document["steps"]} >= {"export-vision", "build-llm"}


def test_images_raise_the_time_to_the_first_token(capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for images in ("0", "1", "2"):
        nvlm_plan("-p", "h200-141gb-latency", "--images", images, "--json")
        times.append(json.loads(capsys.readouterr().out)["prediction"]["ttft_s"])
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("asked", "telling"),
    [
        (["--images", "3"], "3 images, max_images is 2"),
        (["--images", "1000000000"], "1,000,000,000 images, max_images is 2"),
        (["--output-tokens", "9000"], "10,895 tokens with the answer, max_seq_len is 8,192"),
        (["--input-tokens", "1000000000"], "max_seq_len is 8,192"),
    ],
)
def test_a_request_that_would_be_refused_is_a_no_in_the_headline_and_in_the_exit_code(
    asked: list[str], telling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nvlm_plan("-p", "h100-sxm-80gb-throughput", *asked) == 1
    headline = " ".join(capsys.readouterr().out.partition("  on ")[0].split())
    assert "fits, WOULD REFUSE this request" in headline
    assert telling in headline
    assert nvlm_plan("-p", "h100-sxm-80gb-throughput", *asked, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["fits"], document["prediction"]) == (True, None)
    assert telling in document["refused_request"]


def test_more_images_than_fit_into_a_sequence_are_warned_of_in_text_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_profile(tmp_path, "max_images = 2", "max_images = 1000")
    assert nvlm_plan("-p", path) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "warning max_images 1,000 cannot be served: max_seq_len 8,192 has room for 30 of 1 tile, 4 of 7" in text
    assert nvlm_plan("-p", path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert "max_images 1,000 cannot be served" in document["warning"]
    assert document["images"] == {
        "max_images": 1000,
        "room_for_largest": 4,
        "room_for_smallest": 30,
        "evidence": "derived",
    }


def test_the_disk_a_build_takes_counts_scratch_that_is_gone_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["-p", "h100-sxm-80gb-throughput"]
    nvlm_plan(*asked, "--json")
    document = json.loads(capsys.readouterr().out)
    most, steps = document["most_disk_bytes"], document["steps"]
    assert most >= sum(step["disk_bytes"] for step in steps)
    assert most > steps[0]["disk_bytes"] + max(step["scratch_bytes"] for step in steps)
    nvlm_plan(*asked)
    bottom = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(" at most"))
    assert bottom.split()[3] == f"{most / 2**30:.1f}"


def test_the_host_that_builds_is_asked_for_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("-p", "h100-sxm-80gb-throughput", "--host-cores", "64", "--disk-gb-s", "2.5") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "at 2.5 GB/s" in text
    assert nvlm_plan("-p", "h100-sxm-80gb-throughput", "--host-cores", "64", "--disk-gb-s", "2.5", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["host"] == {"cores": 64, "disk_bytes_per_s": 2.5e9}
    assert any("64 cores" in step["how"] for step in document["steps"])


def own_profile(tmp_path: Path, before: str, after: str) -> str:
    text = (profile_folder() / "h100-sxm-80gb-throughput.toml").read_text()
    assert before in text
    (tmp_path / "mine.toml").write_text(text.replace(before, after))
    return str(tmp_path / "mine.toml")


def test_what_does_not_fit_says_by_how_much_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("-p", own_profile(tmp_path, "tensor_parallel = 2", "tensor_parallel = 1")) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "79.2 visible" in text


def test_an_illegal_split_is_refused_with_the_legal_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_profile(tmp_path, "tensor_parallel = 2", "tensor_parallel = 3")
    assert nvlm_plan("-p", path, "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "tensor_parallel 3" in error["message"]
    assert "1, 2, 4, 8" in error["hint"]


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("-p", own_profile(tmp_path, "tensor_parallel", "tensor_paralel"), "--json") == 2
    assert "did you mean 'tensor_parallel'" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_an_objective_names_the_cheapest_profile_and_plans_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("--ttft-ms", "600", "--tpot-ms", "25", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["slo"]["cheapest"] == document["profile"]
    assert document["prediction"]["ttft_s"] <= 0.6
    assert "least GPUs x list price" in document["slo"]["rule"]


def test_an_objective_that_nothing_meets_says_why_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvlm_plan("--ttft-ms", "1") == 1
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "no profile meets it" in text
    assert all(name in text for name in profile_names())


def test_profiles_that_cannot_be_say_so_under_an_objective(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nvlm("plan", str(tiny_folder), "--ttft-ms", "100", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"slo"}
    assert set(document["slo"]["missed"]) == set(profile_names())
    assert "2048 positions" in document["slo"]["missed"]["h200-141gb-latency"][0]


@pytest.mark.parametrize("layers", [10**9, 10**12])
def test_a_nonsense_config_is_refused_at_once_by_name(
    layers: int, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_bytes((tiny_folder / "model.safetensors.index.json").read_bytes())
    assert nvlm("plan", str(tmp_path), "-p", "cpu") == 2
    assert "llm_config.num_hidden_layers is 1000000000" in capsys.readouterr().err


def test_a_profile_that_misses_the_objective_ends_with_1_and_names_a_better(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert nvlm_plan("-p", "l40s-throughput", "--ttft-ms", "600") == 1
    assert "cheapest profile that meets it" in capsys.readouterr().out


def test_a_checkpoint_folder_without_its_shards_is_enough(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    assert nvlm("plan", str(tmp_path), "-p", "cpu", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["checkpoint_bytes"] == Checkpoint.open(tiny_folder).size_bytes
    assert document["prediction"] is None


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["plan", "-p", "cpu"], "nothing to plan for"),
        (["plan", "--spec", "nvlm-d-72b"], "no --profile"),
        (["plan", "--spec", "gpt", "-p", "cpu"], "no built-in spec"),
        (["plan", "nowhere", "-p", "cpu"], "no checkpoint folder nowhere"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "tpu"], "no profile 'tpu'"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "../profiles/cpu"], "no profile '../profiles/cpu'"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "h200"], "did you mean 'h200-141gb-latency'"),
        (["plan", "--spec", "nvlm-72b", "-p", "cpu"], "did you mean 'nvlm-d-72b'"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "cpu", "--disk-gb-s", "0"], "--disk-gb-s"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "cpu", "--disk-gb-s", "nan"], "--disk-gb-s"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "cpu", "--images", "1" + 30 * "0"], "--images"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "cpu", "--images", "-1"], "--images"),
        (["plan", "--spec", "nvlm-d-72b", "-p", "cpu", "--ttft-ms", "nan"], "no objective"),
    ],
)
def test_wrong_input_ends_with_2_and_names_it(
    arguments: list[str], telling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nvlm(*arguments) == 2
    assert telling in capsys.readouterr().err
