"""Runs the tritonserver that ships inside the nvidia-pytriton wheel, and leaves no process behind.

What it needs to start was found by trying (facts/running-on-a-cpu.md): the wheel's bundled libraries and the shared
libpython on LD_LIBRARY_PATH, and a backend folder with the stub of this Python's version beside libtriton_python.so.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path

from nvlm_deploy.errors import MachineError
from nvlm_deploy.triton.repository import link_or_copy, read_repository

LOG_TAIL_LINES = 12
# tables, information, and the import machinery inside tracebacks
_DULL_LINES = ("+-", "| ", "I", "At:", "  <frozen")
# the server is a child of this process; when that dies, however it dies, the kernel tells the server to stop
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process has died")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Ports:
    """Where the server listens, on `host`."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002
    host: str = "127.0.0.1"

    @classmethod
    def free(cls) -> Ports:
        """Three ports that nobody listens on at the moment."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return cls(*(each.getsockname()[1] for each in sockets))

    def require_free(self) -> None:
        """Raises MachineError naming the first port that is taken."""
        for name, port in (("gRPC", self.grpc), ("HTTP", self.http), ("metrics", self.metrics)):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as problem:
                    raise MachineError(
                        f"{name} port {port} on {self.host} cannot be used: {problem.strerror}",
                        hint=f"stop what listens there (`ss -ltnp 'sport = :{port}'`) or choose another port",
                    ) from None


@dataclass(frozen=True)
class ServerChoices:
    """How to run a server; times in seconds."""

    ports: Ports = Ports()
    ready_timeout_s: float = 120.0
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
        self.log_file = Path()

    @property
    def grpc_url(self) -> str:
        """host:port for gRPC clients."""
        return f"{self.choices.ports.host}:{self.choices.ports.grpc}"

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
        read_repository(self.repository)
        self.choices.ports.require_free()
        installation = find_installation()
        with self._stack:
            scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nvlm-triton-")))
            self.log_file = self.choices.log_file or scratch / "tritonserver.log"
            prepare_backend(installation, scratch / "backends")
            self._start(installation, scratch)
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
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.choices.exit_timeout_s + 5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def wait(self) -> int:
        """Block until the server ends by itself; its exit status."""
        return self._process.wait() if self._process is not None else 0

    def log_tail(self) -> str:
        """The last lines of the server's log that say something, without its tables."""
        with self.log_file.open(encoding="utf-8", errors="replace") as log:
            lines = (line for line in log if line.strip() and not line.startswith(_DULL_LINES))
            return "".join(line[:400].rstrip() + "\n" for line in collections.deque(lines, maxlen=LOG_TAIL_LINES))

    def _start(self, installation: Installation, scratch: Path) -> None:
        command = [
            *(sys.executable, "-c", _LAUNCHER, str(os.getpid())),
            *server_command(installation, self.repository, scratch / "backends", self.choices),
        ]
        environment = server_environment(installation, threads=self.choices.threads)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.choices.ready_timeout_s
        url = f"http://{self.choices.ports.host}:{self.choices.ports.http}/v2/health/ready"
        while not _answers(url):
            status = self._process.poll() if self._process is not None else None
            if status is not None:
                raise MachineError(
                    f"tritonserver ended with status {status} while loading; its log ends:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                waited = f"{self.choices.ready_timeout_s:g} s"
                raise MachineError(f"tritonserver was not ready after {waited}; its log ends:\n{self.log_tail()}")
            time.sleep(0.1)


@dataclass(frozen=True)
class Installation:
    """Where the wheel's parts and the shared libpython are."""

    server: Path
    python_backend: Path
    stub: Path
    caches: Path
    library_folders: tuple[Path, ...]


def find_installation() -> Installation:
    """The bundled server. Raises MachineError naming the part that is missing and how to get it."""
    package = util.find_spec("pytriton")
    if package is None or not package.submodule_search_locations:
        raise MachineError("nvidia-pytriton is not installed", hint="pip install 'nvlm-deploy[serve]'")
    root = Path(package.submodule_search_locations[0]) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    installation = Installation(
        server=root / "bin" / "tritonserver",
        python_backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
        caches=root / "caches",
        library_folders=(libpython_folder(version), root.parents[1] / "nvidia_pytriton.libs"),
    )
    for part in (installation.server, installation.python_backend, installation.stub, *installation.library_folders):
        if not part.exists():
            raise MachineError(
                f"nvidia-pytriton has no {part.name} for Python {version}", hint="use Python 3.11 to 3.13"
            )
    _require_old_numpy()
    return installation


def libpython_folder(version: str) -> Path:
    """The folder of the shared libpython that the stub links to; MachineError says which package has it."""
    name = f"libpython{version}.so.1.0"
    candidates = [
        sysconfig.get_config_var("LIBDIR"),
        Path(sys.base_prefix) / "lib",
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "/usr/lib64",
    ]
    for candidate in candidates:
        if candidate and (Path(candidate) / name).exists():
            return Path(candidate)
    raise MachineError(f"no {name} found: Triton's python stub needs it", hint=f"apt-get install libpython{version}")


def _require_old_numpy() -> None:
    """The stub's pybind11 reads numpy 2's arrays wrong: every string tensor would crash it."""
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise MachineError(f"numpy {version} crashes Triton's python stub", hint="pip install 'numpy<2'")


def prepare_backend(installation: Installation, folder: Path) -> None:
    """A backend directory with the stub of this Python's version beside the backend's library.

    The stub runs an isolated interpreter, which knows the virtual environment but no PYTHONPATH. The backend's
    folder is on its import path, so this very package is linked there.
    """
    backend = folder / "python"
    package = backend / "nvlm_deploy"
    package.mkdir(parents=True)
    for part in (*installation.python_backend.iterdir(), installation.stub):
        if part.is_file():
            link_or_copy(part, backend / part.name)
    roots = {Path(root).resolve() for root in import_module("nvlm_deploy").__path__}
    for part in (part for root in roots for part in root.glob("[a-z]*")):
        (package / part.name).symlink_to(part)


def server_command(installation: Installation, repository: Path, backends: Path, choices: ServerChoices) -> list[str]:
    """tritonserver's argument list; shared memory has a name of its own, so that servers can run side by side."""
    ports = choices.ports
    return [
        str(installation.server),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--cache-directory={installation.caches}",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={choices.exit_timeout_s}",
        f"--backend-config=python,shm-region-prefix-name=nvlm_{uuid.uuid4().hex[:12]}",
        *(f"--{kind}-address={ports.host}" for kind in ("grpc", "http", "metrics")),
        f"--grpc-port={ports.grpc}",
        f"--http-port={ports.http}",
        f"--metrics-port={ports.metrics}",
        *choices.extra_arguments,
    ]


def server_environment(installation: Installation, *, threads: int) -> dict[str, str]:
    """This process's environment with what the server needs; few threads, as its stubs share the cores."""
    environment = dict(os.environ)
    libraries = [*(str(folder) for folder in installation.library_folders), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:  # noqa: S310  # our own http:// URL
            return bool(response.status == 200)
    except OSError:
        return False


def running(repository: Path, choices: ServerChoices | None = None) -> Iterator[TritonServer]:
    """A server for the length of a generator; for test fixtures."""
    with TritonServer(repository, choices) as server:
        yield server
