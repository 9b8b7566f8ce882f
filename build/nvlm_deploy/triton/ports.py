"""Where a server listens: an address of this machine and three ports, as each of Triton's services wants it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from dataclasses import dataclass

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.machine.address import Address

_ANOTHER_HOST = "--host 127.0.0.1, 0.0.0.0 for every interface, or one of the addresses that `ip address` lists"


@dataclass(frozen=True)
class Ports:
    """Where the server listens, on `host`: a name or an address, an IPv6 one with or without brackets."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if self.host.startswith("[") and self.host.endswith("]"):
            object.__setattr__(self, "host", self.host[1:-1])

    @classmethod
    def free(cls) -> Ports:
        """Three ports that nobody listens on at the moment."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return cls(*(each.getsockname()[1] for each in sockets))

    @property
    def grpc_url(self) -> str:
        """HOST:PORT for gRPC clients."""
        return str(Address(self.host, self.grpc))

    @property
    def http_url(self) -> str:
        """HOST:PORT for HTTP clients."""
        return str(Address(self.host, self.http))

    @property
    def readiness_url(self) -> str:
        """What says whether the server is ready, as it is reached from this machine."""
        address = self.number
        number = ipaddress.ip_address(address)
        if number.is_unspecified:
            address = "127.0.0.1" if number.version == 4 else "::1"
        return f"http://{Address(address, self.http)}/v2/health/ready"

    @property
    def number(self) -> str:
        """The address that `host` stands for, IPv4 where it has both; MachineError for a name that nobody knows."""
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # a name with an empty part is no name for IDNA
            reason = f"no host and no address of the name {self.host}"
            raise MachineError(f"{self.host} cannot be used: {reason}", hint=_ANOTHER_HOST) from None
        return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])

    def address_arguments(self) -> list[str]:
        """The addresses on tritonserver's command line: gRPC wants brackets around IPv6, the others a prefix.

        Its HTTP services know no names: on one they would say that they listen, and not do it. A name that is not
        known here stays as it is: the command may be for another machine.
        """
        with contextlib.suppress(MachineError):
            address = self.number
            plain, bracketed = (f"ipv6:{address}", f"[{address}]") if ":" in address else (address, address)
            return _arguments(bracketed, plain)
        return _arguments(self.host, self.host)

    def require_usable(self) -> None:
        """Raises NvlmError where two are the same, or there is no address."""
        if not self.host:
            raise NvlmError("no address to listen on", hint="--host 127.0.0.1, or 0.0.0.0 for every interface")
        if "%" in self.host:
            raise NvlmError(f"{self.host} names an interface, which Triton does not take", hint=_ANOTHER_HOST)
        if len({self.grpc, self.http, self.metrics}) < 3:
            raise NvlmError(
                f"gRPC, HTTP and metrics need three ports, not {self.grpc}, {self.http}, {self.metrics}",
                hint="choose others: --grpc-port, --http-port, --metrics-port",
            )

    def require_free(self) -> None:
        """As `require_usable`; raises MachineError naming the first port that cannot be listened on, and why."""
        self.require_usable()
        address = self.number
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for name, port in (("gRPC", self.grpc), ("HTTP", self.http), ("metrics", self.metrics)):
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError as problem:
                    raise self._unusable(name, port, problem) from None

    def _unusable(self, name: str, port: int, problem: OSError) -> MachineError:
        if problem.errno == errno.EADDRNOTAVAIL:
            reason = f"{self.host} is not an address of this machine"
            return MachineError(f"{name} port {port} on {self.host} cannot be used: {reason}", hint=_ANOTHER_HOST)
        hint = f"stop what listens there (`ss -ltnp 'sport = :{port}'`) or choose another port"
        if problem.errno == errno.EACCES:
            hint = "choose another port: those below 1024 need privileges"
        return MachineError(f"{name} port {port} on {self.host} cannot be used: {problem.strerror}", hint=hint)


def _arguments(grpc: str, http: str) -> list[str]:
    return [f"--grpc-address={grpc}", f"--http-address={http}", f"--metrics-address={http}"]
