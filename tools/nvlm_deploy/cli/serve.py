"""`nvlm serve`: run the bundled tritonserver on an assembled repository until Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nvlm_deploy.cli.options import DryRunOption, JsonOption


def register(app: typer.Typer) -> None:
    app.command(name="serve")(serve)


def serve(
    repository: Annotated[Path, typer.Argument(help="A folder that `nvlm build` or `nvlm assemble` made.")],
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    ready_timeout_s: Annotated[float, typer.Option(min=1, help="Give up when not ready by then.")] = 300.0,
    log_file: Annotated[Path | None, typer.Option(help="Keep the server's log here.")] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Serve only what the owner of this Ed25519 key has signed (`nvlm sign`).")
    ] = None,
    ignore_calibration: Annotated[
        bool, typer.Option("--ignore-calibration", help="Do not look whether the calibration list is as it was.")
    ] = False,
    dry_run: DryRunOption = False,
    json_output: JsonOption = False,
) -> None:
    """Check the repository, start Triton, wait until every model is ready, and stop it cleanly on Ctrl-C.

    Refused is a repository with a byte other than it was built with, and one whose engines are bound to another GPU,
    driver, TensorRT or TensorRT-LLM: exit code 1. Exit code 2 for a folder that is no repository, 3 where the machine
    fails: no driver, a port in use, a server that dies.
    """
    from nvlm_deploy.errors import MachineError
    from nvlm_deploy.signature import public_key as key_in
    from nvlm_deploy.triton.servable import remove_caches, require_servable
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer, command_to_paste
    from nvlm_deploy.verification import Demand

    key = None if public_key is None else key_in(public_key)
    require_servable(repository, Demand(key, calibration=not ignore_calibration))
    ports = Ports(grpc_port, http_port, metrics_port, host)
    choices = ServerChoices(ports, ready_timeout_s, log_file=log_file)
    if dry_run:
        choices.ports.require_usable()
        command = command_to_paste(repository, choices)
        would = {"repository": str(repository), "would_listen_on": ports.grpc_url}
        print(json.dumps(would | ({} if command is None else {"command": command})))
        return
    remove_caches(repository)
    with TritonServer(repository, choices) as server:
        ready = {"grpc": server.grpc_url, "http": ports.http_url, "process_id": server.process_id}
        print(json.dumps(ready) if json_output else f"ready: gRPC {ready['grpc']}, HTTP {ready['http']}", flush=True)
        raise MachineError(f"tritonserver was stopped: {server.wait()}{server.log_ending()}")
