"""Digests of an artifact's files: `nvlm verify` beside sha256sum, from the page cache and from the disk; in a build.

    python tests/bench/bench_digest.py                 8 files, 2 GB in all
    python tests/bench/bench_digest.py --gigabytes 8

The files are those of an artifact with a manifest; what is timed is a process from start to end, imports and all. The
sums of both sides are compared. `xargs -P` gives sha256sum all cores, as nvlm takes them. SHA-256 alone is what one
core makes of bytes in memory; reading alone is what the disk gives. A shared machine does not give all the time what it
has: the sides take turns, each pair of runs starts with the other side, and the best of each counts.

A step of a build streams tensors of the same size into as many files: what it reads of them, to compare them with what
was meant, for their digests, and when the next step looks at them, is counted for each byte written.

Prints a table and, as its last line, one JSON object. Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_vision_export import forget
from rich import box
from rich.console import Console
from rich.table import Table

from nvlm_deploy.artifacts import digests, write_manifest
from nvlm_deploy.checkpoint.read_back import read_back
from nvlm_deploy.checkpoint.resumable import tensor_files
from nvlm_deploy.manifest import Manifest, read_manifest
from nvlm_deploy.pipeline import Step, run_step
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table

FILES, REPEATS = 8, 3
CHUNK_BYTES = 1 << 24
# the bar, in 10^9 bytes a second
GB_S = 1.0
# one pass over each file, and the manifests
MOST_READ = 1.01

OURS = """
import sys
from nvlm_deploy.cli.main import run
run(["verify", sys.argv[1], "--json"])
"""


def write_artifact(folder: Path, size_bytes: int) -> None:
    """Equal files of noise and a manifest that lists them."""
    folder.mkdir(parents=True)
    noise = os.urandom(CHUNK_BYTES)
    for number in range(FILES):
        with (folder / f"rank{number}.safetensors").open("wb") as file:
            for start in range(0, size_bytes // FILES, CHUNK_BYTES):
                file.write(number.to_bytes(8, "little") + start.to_bytes(8, "little") + noise[16:])
            os.fsync(file.fileno())
    facts: dict[str, Any] = {"kind": "bench", "key": "", "inputs": {}, "settings": {}, "tools": {}}
    write_manifest(folder, Manifest(**facts, outputs=digests(folder), evidence="measured"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("rank*"))


def ours(folder: Path) -> float:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", OURS, str(folder)], check=True, stdout=subprocess.PIPE)
    seconds = time.monotonic() - started
    if not json.loads(done.stdout)["passed"]:
        raise SystemExit("nvlm verify found something in files that nobody changed")
    return seconds


def sha256sum(folder: Path, processes: int) -> float:
    """Seconds; the sums must be those of the manifest."""
    names = sorted(path.name for path in folder.glob("rank*"))
    command = ["xargs", "-P", str(processes), "-n", "1" if processes > 1 else str(FILES), "sha256sum"]
    started = time.monotonic()
    done = subprocess.run(command, input="\n".join(names), text=True, cwd=folder, check=True, stdout=subprocess.PIPE)
    seconds = time.monotonic() - started
    sums = {name: digest for digest, name in (line.split() for line in done.stdout.splitlines())}
    if sums != read_manifest(folder).outputs:
        raise SystemExit("sha256sum and the manifest disagree")
    return seconds


def reading(folder: Path) -> float:
    started, buffer = time.monotonic(), bytearray(CHUNK_BYTES)
    for path in sorted(folder.glob("rank*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - started


def processor_rate(folder: Path) -> float:
    """GB digested in a second of processor time, whatever else the machine does: what each core adds on a quiet one."""
    reading(folder)
    started = time.process_time()
    digests(folder)
    return size_of(folder) / (time.process_time() - started) / 1e9


def read_back_rate(folder: Path) -> float:
    """GB compared and digested in a second of processor time, in the one pass that a build makes over its output."""
    reading(folder)
    started = time.process_time()
    for path in folder.glob("rank*"):
        with path.open("rb") as file:
            read_back(file.fileno(), {"tensor": range(1 << 12, path.stat().st_size)})
    return size_of(folder) / (time.process_time() - started) / 1e9


def read_for_each_byte_written(folder: Path, size_bytes: int) -> float:
    """By a step that streams, and by the next one's look at its input; in this process, whoever asked for the bytes."""
    chunk = os.urandom(CHUNK_BYTES)
    header = {"weight": ("F8_E4M3", (size_bytes // FILES // CHUNK_BYTES, CHUNK_BYTES))}
    headers = {f"rank{number}.safetensors": header for number in range(FILES)}

    def make(unfinished: Path) -> dict[str, Any]:
        with tensor_files(unfinished, headers, identity="bench") as files:
            for name in headers:
                with files.tensor(name, "weight") as tensor:
                    while tensor.missing_bytes:
                        tensor.append_bytes(chunk)
        return {}

    before = _read_bytes()
    run_step(Step("stream", folder, {}, {}, make, resumes=True))
    Step("next", folder.with_name("next"), {"streamed": folder}, {}, make).key  # noqa: B018  # looks at its input
    return (_read_bytes() - before) / size_of(folder)


def _read_bytes() -> int:
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])


def hashing(size_bytes: int = 1 << 30) -> float:
    """GB/s of one core."""
    data, digest = os.urandom(CHUNK_BYTES), hashlib.sha256()
    started = time.monotonic()
    for _ in range(size_bytes // CHUNK_BYTES):
        digest.update(data)
    return size_bytes / (time.monotonic() - started) / 1e9


def rates(folder: Path, *, cold: bool) -> dict[str, float]:
    """GB/s of each side, the best of its turns."""
    cores, size = len(os.sched_getaffinity(0)), size_of(folder)
    sides = {
        "nvlm verify": lambda: ours(folder),
        "sha256sum": lambda: sha256sum(folder, 1),
        f"sha256sum, {cores} processes": lambda: sha256sum(folder, cores),
        "reading alone": lambda: reading(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(REPEATS):
        for name in sorted(sides, reverse=bool(turn % 2)):
            forget(folder) if cold else reading(folder)
            seconds[name].append(sides[name]())
    return {name: size / min(times) / 1e9 for name, times in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2, help="of all files together (default: 2)")
    parser.add_argument("--folder", type=Path, default=Path("engines/bench/digest"), help="removed at the end")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    try:
        write_artifact(arguments.folder, int(arguments.gigabytes * 1e9))
        bytes_ = int(arguments.gigabytes * 1e9)
        return bench(arguments.folder, read_for_each_byte_written(arguments.folder.with_name("streamed"), bytes_))
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        shutil.rmtree(arguments.folder.with_name("streamed"), ignore_errors=True)


def bench(folder: Path, bytes_read: float) -> int:
    warm, cold, core = rates(folder, cold=False), rates(folder, cold=True), hashing()
    cores, each = len(os.sched_getaffinity(0)), max(processor_rate(folder) for _ in range(REPEATS))
    peer = f"sha256sum, {cores} processes"
    compared = max(read_back_rate(folder) for _ in range(REPEATS))
    judged = [
        _verdict("read back and digested, a second of one core", compared, "GB", GB_S),
        Verdict(
            Measurement("bytes that a build reads of its output, each", bytes_read, "", 1), Bar("at most", MOST_READ)
        ),
        _verdict("digests of an artifact, a second of one core", each, "GB", GB_S),
        _verdict("nvlm verify, from the page cache", warm["nvlm verify"], "GB/s", GB_S),
        _verdict("over sha256sum, from the page cache", warm["nvlm verify"] / warm["sha256sum"], "times", 1),
        _verdict(f"over {peer}, from the page cache", warm["nvlm verify"] / warm[peer], "times", 1),
        _verdict(f"over {peer}, from the disk", cold["nvlm verify"] / cold[peer], "times", 1),
    ]
    console = Console()
    table = Table(
        "GB/s", "page cache", "disk", title=f"{size_of(folder) / 1e9:.1f} GB in {FILES} files", box=box.SIMPLE
    )
    for name in warm:
        table.add_row(name, f"{warm[name]:.2f}", f"{cold[name]:.2f}")
    table.add_row("SHA-256 alone, one core", f"{core:.2f}", "")
    table.add_row("nvlm's digests, a second of one core", f"{each:.2f}", "")
    console.print(table, verdict_table(judged))
    results = {f"{name}: page cache, GB/s": rate for name, rate in warm.items()}
    results |= {f"{name}: disk, GB/s": rate for name, rate in cold.items()}
    results |= {"read back and digested, GB a second of one core": compared, "bytes read for each written": bytes_read}
    results |= {"digests, GB a second of one core": each, "SHA-256 alone, one core, GB/s": core}
    bars = [verdict.as_json() for verdict in judged]
    print(json.dumps({"name": "digest", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(judged) else 1


def _verdict(what: str, value: float, unit: str, bound: float) -> Verdict:
    return Verdict(Measurement(what, value, unit, REPEATS), Bar("at least", bound))


if __name__ == "__main__":
    sys.exit(main())
