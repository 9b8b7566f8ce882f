"""Ranks built by child processes: some at a time, with fewer after a death from lack of memory, every log kept."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nvlm_deploy.artifacts import write_text
from nvlm_deploy.errors import MachineError

log = logging.getLogger(__name__)

TAIL_LINES = 12
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_POLL_S = 0.05
_GRACE_S = 10.0
# in what TensorRT, CUDA and torch say; host memory has no words, only a signal
_GPU_MEMORY_WORDS = ("outofmemory", "out of memory", "insufficient memory")


@dataclass(frozen=True)
class RankCommand:
    """What builds one rank's engine."""

    rank: int
    argv: tuple[str, ...]

    @property
    def shell(self) -> str:
        """To paste into a shell."""
        return shlex.join(self.argv)


@dataclass(frozen=True)
class RankBuild:
    """One rank's finished engine and what it took; `peak_bytes` is the child's largest resident set."""

    rank: int
    argv: tuple[str, ...]
    engine_bytes: int
    seconds: float
    peak_bytes: int
    attempts: int


@dataclass(frozen=True)
class Workshop:
    """Where ranks are built: the folder they fill, the GPUs, the memory each is thought to need, failed logs' place."""

    folder: Path
    devices: Sequence[str]
    rank_bytes: int
    failed_logs: Path


def engine_file(rank: int) -> str:
    return f"rank{rank}.engine"


def build_ranks(commands: Sequence[RankCommand], shop: Workshop, *, at_once: int) -> list[RankBuild]:
    """Build every rank that is not finished in the folder, and return all, by rank.

    A rank that dies from SIGKILL, as by the kernel when memory is short, is built again with half as many at once.
    Raises MachineError with the last lines of its log when a rank fails otherwise, or alone.
    """
    finished = {command.rank: build for command in commands if (build := _finished(shop.folder, command)) is not None}
    attempt, at_once = 1, max(1, min(at_once, len(shop.devices), len(commands)))
    while pending := [command for command in commands if command.rank not in finished]:
        log.info("building rank %s, %d at a time", ", ".join(str(command.rank) for command in pending), at_once)
        killed = _build_all(pending, shop, at_once, attempt, finished)
        if killed and at_once == 1:
            raise _out_of_memory(killed[0], shop)
        if killed:
            at_once //= 2
            names = ", ".join(str(command.rank) for command in killed)
            log.warning("rank %s was killed, mostly for lack of memory; again with %d at a time", names, at_once)
        attempt += 1
    return [finished[command.rank] for command in commands]


@dataclass
class _Child:
    """A running build."""

    command: RankCommand
    device: str
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)

    def ended(self) -> tuple[int, int] | None:
        """Exit code and largest resident set, in bytes; None while it runs."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, usage.ru_maxrss * 1024


def _build_all(
    pending: Sequence[RankCommand], shop: Workshop, at_once: int, attempt: int, finished: dict[int, RankBuild]
) -> list[RankCommand]:
    """Fill `finished`; return the ranks that were killed. After the first of them no other is started."""
    waiting, free, killed = list(pending), list(shop.devices), list[RankCommand]()
    with _children() as running:
        while running or (waiting and not killed):
            while waiting and not killed and len(running) < at_once:
                running.append(_start(waiting.pop(0), shop.folder, free.pop(0), attempt))
            time.sleep(_POLL_S)
            for child in list(running):
                end = child.ended()
                if end is None:
                    continue
                running.remove(child)
                free.append(child.device)
                if end[0] in _KILLED:
                    _keep_log(child.command.rank, shop)
                    killed.append(child.command)
                else:
                    finished[child.command.rank] = _judged(child, end, shop, attempt)
    return killed


@contextmanager
def _children() -> Iterator[list[_Child]]:
    """Running children; none is left behind when the block is left, by whatever way."""
    running: list[_Child] = []
    try:
        yield running
    finally:
        for child in running:
            child.process.terminate()
        for child in running:
            try:
                child.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _start(command: RankCommand, folder: Path, device: str, attempt: int) -> _Child:
    path = log_file(folder, command.rank)
    if path.exists():  # of an attempt before, in this run or in one that was killed
        _require_ended(path)
        path.rename(_older_log(path))
    log.info("rank %d on GPU %s, attempt %d, log %s", command.rank, device, attempt, path)
    (folder / engine_file(command.rank)).unlink(missing_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the child inherits it with its stdout
        file.write(f"$ CUDA_VISIBLE_DEVICES={device} {command.shell}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
        )
    return _Child(command, device, process)


def _require_ended(path: Path) -> None:
    """A run killed by SIGKILL leaves its children alive; they hold the lock of their log and would write our engine."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                f"a process of an earlier run still writes {path}", hint=f"wait for it, or end it: `fuser -v {path}`"
            ) from None


def log_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _older_log(path: Path) -> Path:
    number = 1
    while (older := path.with_name(f"{path.stem}-attempt{number}.log")).exists():
        number += 1
    return older


def _judged(child: _Child, end: tuple[int, int], shop: Workshop, attempt: int) -> RankBuild:
    """A finished engine, noted in the folder for a run that goes on. Raises MachineError when it is none."""
    code, peak = end
    rank, engine = child.command.rank, shop.folder / engine_file(child.command.rank)
    size = engine.stat().st_size if engine.is_file() else 0
    if code or not size:
        raise _failure(child.command, code, shop)
    seconds = round(time.monotonic() - child.started, 1)
    build = RankBuild(rank, child.command.argv, size, seconds, peak, attempt)
    write_text(_note(shop.folder, rank), json.dumps(asdict(build), indent=1) + "\n")
    log.info("rank %d: %d bytes in %.1f s, at most %.1f GiB of host memory", rank, size, seconds, peak / 2**30)
    return build


def _finished(folder: Path, command: RankCommand) -> RankBuild | None:
    """What an earlier run of the same command finished; it is noted only after the engine was whole."""
    note, engine = _note(folder, command.rank), folder / engine_file(command.rank)
    if not note.is_file() or not engine.is_file():
        return None
    facts: Mapping[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    build = RankBuild(**{**facts, "argv": tuple(facts["argv"])})
    return build if build.argv == command.argv and build.engine_bytes == engine.stat().st_size else None


def _note(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _keep_log(rank: int, shop: Workshop) -> Path:
    """The log where it stays: the folder that was to become the artifact may go when the build has failed."""
    kept = shop.failed_logs / f"trtllm-build-rank{rank}-failed.log"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log_file(shop.folder, rank), kept)
    return kept


def _failure(command: RankCommand, code: int, shop: Workshop) -> MachineError:
    kept = _keep_log(command.rank, shop)
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    elif code:
        how = f"ended with exit code {code}"
    else:
        how = f"ended well but wrote no {engine_file(command.rank)}"
    tail = _tail(kept)
    hint = f"read {kept}; `nvlm doctor --container` says whether this TensorRT-LLM takes what we give it"
    if any(word in tail.lower() for word in _GPU_MEMORY_WORDS):
        hint = "the GPU's memory: stop other programs (`nvidia-smi`), or lower max_num_tokens or max_batch_size"
    return MachineError(f"trtllm-build {how} at rank {command.rank}\n{tail}\n  log: {kept}", hint=hint)


def _out_of_memory(command: RankCommand, shop: Workshop) -> MachineError:
    kept = _keep_log(command.rank, shop)
    return MachineError(
        f"trtllm-build was killed at rank {command.rank}, which was built alone\n{_tail(kept)}\n  log: {kept}",
        hint=f"mostly out of host memory (`dmesg | grep -i oom`): one rank is thought to need {_gib(shop.rank_bytes)}; "
        "more tensor_parallel makes ranks smaller",
    )


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:][-TAIL_LINES:]
    return "\n".join(f"  | {line[:300]}" for line in lines) or "  | (empty)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"
