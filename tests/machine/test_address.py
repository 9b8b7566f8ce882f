"""HOST:PORT is read as it was meant, or refused with what to give instead."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.machine.address import Address, Proxy, Route, address_from


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("localhost:8001", "localhost", 8001),
        ("gpu-7.cluster.local:1", "gpu-7.cluster.local", 1),
        ("my_pod:65535", "my_pod", 65535),
        ("host.:80", "host.", 80),
        ("10.0.0.7:8001", "10.0.0.7", 8001),
        ("[::1]:8001", "::1", 8001),
        ("[fe80::1%eth0]:8001", "fe80::1%eth0", 8001),
        ("[::ffff:10.0.0.1]:8001", "::ffff:10.0.0.1", 8001),
        ("bücher.example:8001", "xn--bcher-kva.example", 8001),
    ],
)
def test_an_address_is_host_and_port(url, host, port) -> None:
    assert address_from(url) == Address(host, port)
    assert address_from(str(address_from(url))) == Address(host, port)


REFUSED = {
    "": ("is empty", "localhost:8001"),
    "   ": ("is empty", "localhost:8001"),
    "http://localhost:8001": ("scheme http://", "give localhost:8001"),
    "https://gpu7:8001/v2/": ("scheme https://", "give gpu7:8001"),
    "grpc://gpu7": ("scheme grpc://", "give gpu7:8001"),
    "dns:///gpu7:8001": ("scheme dns://", "give gpu7:8001"),
    "http://[::1]:8001": ("scheme http://", r"give \[::1\]:8001"),
    "http://": ("scheme http://", "give localhost:8001"),
    "unix:/run/triton.sock": ("'/run/triton.sock' is not a port", "HOST:PORT"),
    "localhost": ("port is missing", "give localhost:8001"),
    "localhost:": ("port is missing", "give localhost:8001"),
    "10.0.0.7": ("port is missing", "give 10.0.0.7:8001"),
    "8001": ("port is missing", "give localhost:8001"),
    ":8001": ("host is missing", "give localhost:8001"),
    "[::1]": ("port is missing", r"give \[::1\]:8001"),
    "[::1]:": ("port is missing", r"give \[::1\]:8001"),
    "[]:8001": ("not an IPv6 address", ""),
    "[localhost]:8001": ("'localhost' is not an IPv6 address", ""),
    "[10.0.0.1]:8001": ("not an IPv6 address", ""),
    "[::1:8001": ("more than one colon", "brackets"),
    "::1": ("more than one colon", r"\[::1\]:8001"),
    "::1:8001": ("more than one colon", r"\[::1\]:8001"),
    "2001:db8::1:8001": ("more than one colon", "brackets"),
    "a:b:1": ("more than one colon", ""),
    "localhost:0": ("'0' is not a port, expected 1 to 65535", ""),
    "localhost:65536": ("'65536' is not a port", ""),
    "localhost:99999": ("'99999' is not a port", ""),
    "localhost:-1": ("'-1' is not a port", ""),
    "localhost:+80": ("is not a port", ""),
    "localhost:8_0": ("is not a port", ""),
    "localhost:٨٠": ("is not a port", ""),
    "localhost:80.0": ("is not a port", ""),
    "localhost:http": ("'http' is not a port", ""),
    "localhost:8001/v2": ("'8001/v2' is not a port", ""),
    " localhost:8001": ("white space", ""),
    "localhost:8001\n": ("white space", ""),
    "local host:8001": ("white space", ""),
    "localhost: 8001": ("white space", ""),
    "a..b:8001": ("not a host name", ""),
    "-a:8001": ("not a host name", ""),
    "user@host:8001": ("not a host name", ""),
    "*:8001": ("not a host name", ""),
    "a/b:8001": ("not a host name", ""),
    ".:8001": ("not a", ""),
    "x" * 64 + ":8001": ("not a host name", ""),
    "300.1.1.1:8001": ("not an IPv4 address", ""),
    "127.1:8001": ("not an IPv4 address", ""),
    "a\0b:8001": ("not a host name", ""),
    "\udce9:8001": ("not a host name", ""),
}


@pytest.mark.parametrize("url", REFUSED, ids=ascii)
def test_what_is_no_address_is_refused_with_what_to_give(url) -> None:
    reason, hint = REFUSED[url]
    with pytest.raises(NvlmError, match=reason) as refused:
        address_from(url)
    assert refused.value.exit_code == 2
    assert not url.strip() or repr(url) in refused.value.message
    assert not hint or re.search(hint, refused.value.hint or "")


@pytest.mark.parametrize("url", [None, 8001, b"localhost:8001", ("localhost", 8001), True], ids=repr)
def test_an_address_is_a_str(url) -> None:
    with pytest.raises(NvlmError, match="expected HOST:PORT"):
        address_from(url)


@given(st.text(alphabet="[]:.%/@- 0189afxyé\0\n", max_size=20))
def test_whatever_is_given_is_an_address_or_refused(url) -> None:
    try:
        address = address_from(url)
    except NvlmError:
        return
    assert 1 <= address.port <= 65535
    assert address.host and not set(address.host) & set("[]/@ \n\0")
    assert address_from(str(address)) == address


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost.", "a.localhost", "127.0.0.1", "127.255.0.3", "::1", "0.0.0.0", "::", "::ffff:127.0.0.9"],
)
def test_this_machine_is_loopback(host) -> None:
    assert Address(host, 1).is_loopback


@pytest.mark.parametrize(
    "host", ["localhost.example", "mylocalhost", "128.0.0.1", "::2", "10.0.0.1", "::ffff:10.0.0.1"]
)
def test_other_machines_are_not(host) -> None:
    assert not Address(host, 1).is_loopback


@given(st.ip_addresses())
def test_loopback_is_what_the_standard_library_calls_so(address) -> None:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    known = mapped or address
    assert Address(str(address), 1).is_loopback == (known.is_loopback or known.is_unspecified)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://proxy:3128", "http://proxy:3128 ($x)"),
        ("http://me:secret@proxy:3128", "http://proxy:3128 ($x)"),
        ("http://me:se@cret@proxy:3128", "http://proxy:3128 ($x)"),
        ("me:secret@proxy:3128", "proxy:3128 ($x)"),
        ("proxy:3128", "proxy:3128 ($x)"),
    ],
)
def test_a_proxy_is_shown_without_its_password(url, shown) -> None:
    assert str(Proxy("x", url)) == shown


@pytest.mark.parametrize(
    ("host", "without", "goes_past"),
    [
        ("10.255.255.1", "10.255.0.0/16", True),
        ("10.255.255.1", "10.254.0.0/16", False),
        ("2001:db8::1", "2001:db8::/32", True),
        ("gpu7.example", "example", True),
        ("gpu7.example", " .EXAMPLE , other", True),
        ("gpu7.example", "gpu7", False),
        ("gpu7.example", ",,", False),
        ("gpu7.example", "10.0.0.0/8", False),
        ("gpu7.example", "*", False),  # gRPC knows no wildcard
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(host, without, goes_past, monkeypatch) -> None:
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.setenv("no_proxy", without)
    monkeypatch.setenv("grpc_proxy", "http://proxy:3128")
    assert (Route.to(Address(host, 8001)).proxy is None) is goes_past
