"""gRPC channels of both kinds to one server, with the same options."""

from __future__ import annotations

from typing import Any

from nvlm_deploy.machine.address import Route

# gRPC waits up to two minutes between two tries to connect, and 20 s for one: an outage would outlast its end.
LONGEST_BACKOFF_MS = 500
CONNECT_TIMEOUT_MS = 5000


def channel_options(route: Route) -> tuple[tuple[str, int], ...]:
    """Images travel in the message, whose limit is 4 MiB by default; no proxy unless one is on the route."""
    return (
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", LONGEST_BACKOFF_MS),
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),  # gRPC's name for the time one try may take
        ("grpc.use_local_subchannel_pool", 1),  # a new client does not wait out the back-off of an old one
        ("grpc.enable_http_proxy", int(route.proxy is not None)),
    )


def channel_to(route: Route) -> Any:
    """A gRPC channel; connects on first use."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    return grpc.insecure_channel(str(route.address), options=channel_options(route))


def async_channel_to(route: Route) -> Any:
    """A gRPC channel of the running event loop."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    return grpc.aio.insecure_channel(str(route.address), options=channel_options(route))
