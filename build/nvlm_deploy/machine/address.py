"""Addresses of servers: HOST:PORT as people write it, and the proxy that gRPC would send a call through."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

from nvlm_deploy.errors import NvlmError

DEFAULT_PORT = 8001
LAST_PORT = 65535
_EXPECTED = "expected HOST:PORT, as localhost:8001"
# gRPC takes the first of each that is set, even to nothing (src/core/handshaker/http_connect/http_proxy_mapper.cc)
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Address:
    """Host, an IPv6 address without brackets, and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether a connection never leaves this machine; 0.0.0.0 and :: lead there, too."""
        name = self.host.lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost"):
            return True
        address = _ip(self.host)
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        return address is not None and (address.is_loopback or address.is_unspecified)


def address_from(url: object) -> Address:
    """Read HOST:PORT; raises NvlmError that quotes `url` and says what to give instead."""
    if not isinstance(url, str):
        raise NvlmError(f"the server's address is {url!r}, {_EXPECTED}")
    if not url.strip():
        raise NvlmError("the server's address is empty", hint="give HOST:PORT, as localhost:8001")
    host, port = _parts(url)
    if not port.isascii() or not port.isdigit() or not 1 <= int(port[:9]) <= LAST_PORT:
        raise _refused(url, f"{port!r} is not a port, expected 1 to {LAST_PORT}")
    return Address(_valid_host(url, host), int(port))


def _parts(url: str) -> tuple[str, str]:
    """Host and port as they are written; brackets are left out."""
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url):
        rest = url[scheme.end() :].strip("/").split("/")[0]
        raise _refused(url, f"it begins with the scheme {scheme[1]}://", hint=f"give {_with_port(rest)}")
    if re.search(r"\s", url):
        raise _refused(url, "it holds white space")
    if bracketed := re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", url):
        if not isinstance(_ip(bracketed[1]), ipaddress.IPv6Address):
            raise _refused(url, f"{bracketed[1]!r} is not an IPv6 address")
        if not bracketed[2]:
            raise _refused(url, "the port is missing", hint=f"give [{bracketed[1]}]:{DEFAULT_PORT}")
        return bracketed[1], bracketed[2]
    if url.count(":") > 1:
        raise _refused(url, "it has more than one colon", hint="put an IPv6 address into brackets, as [::1]:8001")
    host, _, port = url.partition(":")
    if not port:
        raise _refused(url, "the port is missing", hint=f"give {_with_port(url)}")
    if not host:
        raise _refused(url, "the host is missing", hint=f"give localhost{url}")
    return host, port


def _with_port(host: str) -> str:
    """What was probably meant by something that lacks a host or a port."""
    if host.isdigit():
        return f"localhost:{host}"
    bracketed = isinstance(_ip(host), ipaddress.IPv6Address)
    name = f"[{host}]" if bracketed else host.rstrip(":") or "localhost"
    return name if re.search(r":\d+$", name) and not bracketed else f"{name}:{DEFAULT_PORT}"


def _valid_host(url: str, host: str) -> str:
    """The host, a name of other letters in its ASCII form."""
    if _ip(host) is not None:
        return host
    if re.fullmatch(r"[0-9.]+", host):
        raise _refused(url, f"{host!r} is not an IPv4 address")
    try:
        name = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        name = ""
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.removesuffix(".").split(".")):
        raise _refused(url, f"{host!r} is not a host name")
    return name


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refused(url: str, reason: str, *, hint: str = "give HOST:PORT, as localhost:8001 or [::1]:8001") -> NvlmError:
    return NvlmError(f"{url!r} is not a server's address: {reason}", hint=hint)


@dataclass(frozen=True)
class Proxy:
    """A proxy as the environment names it."""

    variable: str
    url: str

    def __str__(self) -> str:
        """Leaves out a password."""
        without_password = re.sub(r"^([^:/]+://)?.*@", r"\1", self.url)
        return f"{without_password} (${self.variable})"


@dataclass(frozen=True)
class Route:
    """The way to a server: its address, and the proxy between, if any."""

    address: Address
    proxy: Proxy | None = None

    @classmethod
    def to(cls, address: Address) -> Route:
        """No proxy to this machine itself; to others the one that gRPC takes from the environment."""
        return cls(address, None if address.is_loopback else _proxy_to(address))

    def __str__(self) -> str:
        return str(self.address) if self.proxy is None else f"{self.address} through the proxy {self.proxy}"


def _proxy_to(address: Address) -> Proxy | None:
    variable = _first_set(_PROXY_VARIABLES)
    if variable is None or not os.environ[variable]:
        return None
    without = _first_set(_NO_PROXY_VARIABLES)
    entries = [] if without is None else [entry.strip() for entry in os.environ[without].split(",")]
    if any(entry and _includes(entry, address.host) for entry in entries):
        return None
    return Proxy(variable, os.environ[variable])


def _first_set(variables: tuple[str, ...]) -> str | None:
    return next((name for name in variables if name in os.environ), None)


def _includes(entry: str, host: str) -> bool:
    """Whether an entry of no_proxy covers the host: as the end of its name, or as the network its address is in."""
    if host.lower().endswith(entry.lower()):
        return True
    address = _ip(host)
    try:
        return address is not None and address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
