"""Runs the tritonserver that ships inside the nvidia-pytriton wheel, and leaves neither processes nor memory behind.

Where the repository holds TensorRT-LLM's engines, the tritonserver of the container (engine_launch.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nvlm_deploy.errors import MachineError
from nvlm_deploy.scratch import scratch_folder
from nvlm_deploy.triton.engine_fit import EngineFacts
from nvlm_deploy.triton.engine_launch import engine_command, require_engine_server
from nvlm_deploy.triton.installation import (
    Installation,
    find_installation,
    prepare_backend,
    server_environment,
)
from nvlm_deploy.triton.model_processes import ModelProcesses, ending
from nvlm_deploy.triton.ports import Ports as Ports
from nvlm_deploy.triton.repository import engine_facts, read_repository
from nvlm_deploy.triton.server_log import ServerLog

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # where the python backend keeps its regions
_MEMORY_PREFIX = "nvlm_"
# tritonserver 2.51 copies the body of an HTTP request twice onto a thread's stack and dies of signal 11 where it does
# not fit: at 8 MB, the usual limit, a picture of 3 MB in base64 is enough. Address space alone; memory is taken in use.
_STACK_BYTES = 4 << 30
# the server is a child of this process; when that dies, however it dies, the kernel tells the server to stop
_LAUNCHER = f"""
import ctypes, os, resource, signal, sys
most = resource.getrlimit(resource.RLIMIT_STACK)[1]
stack = {_STACK_BYTES} if most == resource.RLIM_INFINITY else min({_STACK_BYTES}, most)
resource.setrlimit(resource.RLIMIT_STACK, (stack, most))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process has died")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class ServerChoices:
    """How to run a server; times in seconds."""

    ports: Ports = field(default_factory=Ports)
    ready_timeout_s: float = 300.0
    exit_timeout_s: int = 10
    log_file: Path | None = None
    threads: int = 1
    extra_arguments: tuple[str, ...] = ()


class TritonServer:
    """A running server; use as a context manager.

    The kernel ties the server to the *thread* that enters, so enter in one that lives as long as the server should.
    """

    def __init__(self, repository: Path, choices: ServerChoices | None = None) -> None:
        self.repository = repository.resolve()
        self.choices = choices or ServerChoices()
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.memory_name = f"{_MEMORY_PREFIX}{os.getpid()}_{uuid.uuid4().hex[:8]}_"
        self.log_file = Path()
        self._log = ServerLog(self.log_file)
        self._models = ModelProcesses(0)

    @property
    def grpc_url(self) -> str:
        """HOST:PORT for gRPC clients."""
        return self.choices.ports.grpc_url

    @property
    def process_id(self) -> int:
        """Process id of tritonserver, which leads a process group with its stubs in it."""
        if self._process is None:
            raise MachineError("the server is not running")
        return self._process.pid

    def __enter__(self) -> TritonServer:
        """Start and wait until every model is ready.

        Raises NvlmError for a folder that is no repository, MachineError for a port in use, a missing part, or a server
        that dies or is not ready in time; the message ends with the tail of its log.
        """
        facts = engine_facts(self.repository, read_repository(self.repository))
        self.choices.ports.require_free()
        remove_abandoned_memory()
        with self._stack:
            scratch = self._stack.enter_context(scratch_folder("triton"))
            self.log_file = self.choices.log_file or scratch / "tritonserver.log"
            folder = plain_path(self.repository, scratch)
            self._log = ServerLog(self.log_file, needs_gpu=facts is not None, links={folder: self.repository})
            if facts is None:
                self._start(folder, *self._bundled(folder, scratch))
            else:
                self._start(folder, *self._of_container(folder, facts))
            self._stack.callback(self.stop)
            self._wait_until_ready()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and remove its scratch folder."""
        self._stack.close()

    def stop(self) -> None:
        """SIGTERM, wait for the requests in flight, then SIGKILL for whatever is left of the process group."""
        process = self._process
        if process is None:
            return
        self._process = None
        with interrupts_ignored():
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.choices.exit_timeout_s + 5)
            kill_group(process)
            remove_shared_memory(self.memory_name)

    def wait(self) -> str:
        """Block until the server is no longer of use; says what ended, and how."""
        while self._process is not None and (status := self._process.poll()) is None:
            if not self._models.look():
                return "; ".join(self._models.endings)
            time.sleep(0.5)
        return "it ended by itself" if self._process is None else f"it {ending(status)}"

    def log_tail(self) -> str:
        """The last lines of the server's log that say something, without its tables."""
        return self._log.tail()

    def log_ending(self) -> str:
        """`log_tail` as the end of an error message; nothing when the log says nothing."""
        tail = self.log_tail()
        return f"\nits log ends:\n{tail}" if tail else ""

    def _bundled(self, folder: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
        """Command and environment of the wheel's server."""
        installation = find_installation()
        prepare_backend(installation, scratch / "backends")
        command = server_command(installation, folder, scratch / "backends", self.choices)
        command.append(f"--backend-config=python,shm-region-prefix-name={self.memory_name}")
        return command, server_environment(installation, threads=self.choices.threads)

    def _of_container(self, folder: Path, facts: EngineFacts) -> tuple[list[str], dict[str, str]]:
        server, mpirun = require_engine_server(facts)
        arguments = server_arguments(server, folder, self.choices)
        return engine_command(arguments, facts, memory_name=self.memory_name, mpirun=mpirun), dict(os.environ)

    def _start(self, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        """In the repository's folder: the decoder's config names its engines from there."""
        tied = [sys.executable, "-c", _LAUNCHER, str(os.getpid()), *command]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                tied,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._models = ModelProcesses(self._process.pid)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.choices.ready_timeout_s
        url = self.choices.ports.readiness_url
        while not _answers(url):
            status = self._process.poll() if self._process is not None else None
            if status is not None:
                raise self._not_ready(f"tritonserver {ending(status)} while loading")
            if time.monotonic() > deadline:
                raise self._not_ready(f"tritonserver was not ready after {self.choices.ready_timeout_s:g} s")
            self._models.look()
            time.sleep(0.1)

    def _not_ready(self, what: str) -> MachineError:
        """What happened, which models did not load and why, which of their processes ended and how, and the log."""
        failed = [f"model {model}: {reason}" for model, reason in self._log.failed_models().items()]
        causes = "".join(f"\n  {cause}" for cause in (*failed, *self._models.failures))
        return MachineError(f"{what}{causes}{self.log_ending()}")


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """A second Ctrl-C while stopping would leave what the first one is about to clear away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def plain_path(repository: Path, scratch: Path) -> Path:
    """A link to the repository without spaces or accents: Triton hands the path to its stubs unquoted and as ASCII."""
    link = scratch / "repository"
    link.symlink_to(repository, target_is_directory=True)
    return link


def server_command(installation: Installation, repository: Path, backends: Path, choices: ServerChoices) -> list[str]:
    """The bundled tritonserver's argument list."""
    places = [f"--backend-directory={backends}", f"--cache-directory={installation.caches}"]
    return [*server_arguments(installation.server, repository, choices), *places]


def server_arguments(server: Path, repository: Path, choices: ServerChoices) -> list[str]:
    """What every tritonserver is told."""
    ports = choices.ports
    return [
        str(server),
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={choices.exit_timeout_s}",
        *ports.address_arguments(),
        f"--grpc-port={ports.grpc}",
        f"--http-port={ports.http}",
        f"--metrics-port={ports.metrics}",
        *choices.extra_arguments,
    ]


def kill_group(leader: subprocess.Popen[bytes], *, patience_s: float = 10.0) -> None:
    """SIGKILL what is left of the process group that `leader` leads, reap it, and wait until the others are gone."""
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
        while time.monotonic() < deadline:
            os.killpg(leader.pid, signal.SIGKILL)
            time.sleep(0.02)


def remove_shared_memory(name: str) -> None:
    """Unlink the regions whose name begins so; a stub that was killed leaves its own."""
    for region in SHARED_MEMORY.glob(f"{name}*"):
        region.unlink(missing_ok=True)


def remove_abandoned_memory() -> None:
    """Unlink what servers left whose starter was killed: the name holds its process id."""
    for region in SHARED_MEMORY.glob(f"{_MEMORY_PREFIX}*"):
        starter = region.name.removeprefix(_MEMORY_PREFIX).split("_")[0]
        if starter.isdigit() and not Path("/proc", starter).exists():
            region.unlink(missing_ok=True)


def _answers(url: str) -> bool:
    """Whether a server of this machine says yes, asked past any proxy of the environment."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False
