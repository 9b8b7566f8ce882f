"""`nvlm serve`: run the bundled tritonserver on an assembled repository until Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_deploy.cli.options import ContainerImageOption, DryRunOption, JsonOption
from nvlm_deploy.llm.engine_tool import CONTAINER_IMAGE

if TYPE_CHECKING:
    from nvlm_deploy.triton.server import ServerChoices


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
    container_image: ContainerImageOption = CONTAINER_IMAGE,
    json_output: JsonOption = False,
) -> None:
    """Check the repository, start Triton, wait until every model is ready, and stop it cleanly on Ctrl-C.

    Refused is a repository with a byte other than it was built with, and one whose engines are bound to another GPU,
    driver, TensorRT or TensorRT-LLM: exit code 1. Exit code 2 for a folder that is no repository, 3 where the machine
    fails: no driver, a port in use, a server that dies. With --dry-run: prints the commands that serve it, here or in
    the container of TensorRT-LLM, whatever machine this is.
    """
    from nvlm_deploy.errors import MachineError
    from nvlm_deploy.signature import public_key as key_in
    from nvlm_deploy.triton.servable import remove_caches, require_as_built, require_servable
    from nvlm_deploy.triton.server import Ports, ServerChoices, TritonServer
    from nvlm_deploy.verification import Demand

    key = None if public_key is None else key_in(public_key)
    demand = Demand(key, calibration=not ignore_calibration)
    ports = Ports(grpc_port, http_port, metrics_port, host)
    choices = ServerChoices(ports, ready_timeout_s, log_file=log_file)
    if dry_run:
        require_as_built(repository, demand)
        ports.require_usable()
        _print_commands(repository, choices, container_image, json_output=json_output)
        return
    require_servable(repository, demand)
    remove_caches(repository)
    with TritonServer(repository, choices) as server:
        ready = {"grpc": server.grpc_url, "http": ports.http_url, "process_id": server.process_id}
        print(json.dumps(ready) if json_output else f"ready: gRPC {ready['grpc']}, HTTP {ready['http']}", flush=True)
        raise MachineError(f"tritonserver was stopped: {server.wait()}{server.log_ending()}")


def _print_commands(repository: Path, choices: ServerChoices, image: str, *, json_output: bool) -> None:
    from nvlm_deploy.triton.launch_commands import launch_commands
    from nvlm_deploy.triton.servable import why_not_here

    found, refusal = launch_commands(repository, choices, image=image), why_not_here(repository)
    listening = choices.ports.grpc_url
    if json_output:
        would = {"repository": str(repository), "would_listen_on": listening, "refused_here": refusal}
        print(json.dumps(would | found.as_json()))
        return
    print(f"# {found.remark}; gRPC on {listening}")
    if refusal is not None:
        print("# `nvlm serve` would not start it on this machine: " + " ".join(refusal.split()))
    if found.start is not None:
        print("# a shell in the container (--container-image: the image as your registry calls it), then in it:")
        print(found.start)
    print("\n".join(found.lines))
