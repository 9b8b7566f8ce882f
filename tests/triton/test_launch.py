"""The server's surroundings and command line, without starting one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from nvlm_deploy.errors import MachineError, NvlmError
from nvlm_deploy.triton.installation import (
    find_installation,
    libpython_folder,
    prepare_backend,
    server_environment,
)
from nvlm_deploy.triton.server import (
    SHARED_MEMORY,
    Ports,
    ServerChoices,
    kill_group,
    remove_abandoned_memory,
    remove_shared_memory,
    server_command,
)


@pytest.mark.needs("serve")
def test_configs_must_be_complete_and_only_the_given_address_listens(tmp_path) -> None:
    command = server_command(find_installation(), tmp_path, tmp_path, ServerChoices(Ports(1, 2, 3, "127.0.0.9")))
    assert "--disable-auto-complete-config" in command
    assert {"--grpc-address=127.0.0.9", "--http-address=127.0.0.9", "--metrics-address=127.0.0.9"} <= set(command)


@pytest.mark.needs("serve")
def test_the_backend_folder_has_the_stub_and_this_package(tmp_path) -> None:
    prepare_backend(find_installation(), tmp_path)
    assert os.access(tmp_path / "python" / "triton_python_backend_stub", os.X_OK)
    assert (tmp_path / "python" / "libtriton_python.so").is_file()
    assert (tmp_path / "python" / "nvlm_deploy" / "serving" / "preprocessing.py").is_file()


@pytest.mark.needs("serve")
def test_of_two_clones_on_the_path_the_server_gets_what_python_imports(tmp_path, monkeypatch) -> None:
    """PYTHONPATH names one, the other is installed: the stub must run the same code as this process."""
    import nvlm_deploy

    for clone, rooms in (("first", ("serving", "only_first")), ("second", ("serving", "only_second"))):
        for room in rooms:
            (tmp_path / clone / "nvlm_deploy" / room).mkdir(parents=True)
    roots = [str(tmp_path / clone / "nvlm_deploy") for clone in ("first", "second")]
    monkeypatch.setattr(nvlm_deploy, "__path__", roots)
    prepare_backend(find_installation(), tmp_path / "backends")
    package = tmp_path / "backends" / "python" / "nvlm_deploy"
    assert {link.name for link in package.iterdir()} == {"serving", "only_first", "only_second"}
    assert (package / "serving").resolve() == tmp_path / "first" / "nvlm_deploy" / "serving"


@pytest.mark.needs("serve")
def test_the_stub_finds_all_its_libraries(tmp_path) -> None:
    installation = find_installation()
    listed = subprocess.run(
        ["ldd", installation.stub], env=server_environment(installation, threads=1), capture_output=True, text=True
    )
    assert "libpython" in listed.stdout
    assert "not found" not in listed.stdout


@pytest.mark.needs("serve")
def test_the_environment_keeps_the_threads_few_and_this_python_first() -> None:
    environment = server_environment(find_installation(), threads=2)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["PATH"].startswith(os.path.dirname(sys.executable))  # noqa: PTH120


def test_a_missing_libpython_names_the_package() -> None:
    with pytest.raises(MachineError, match=r"no libpython3\.99") as failure:
        libpython_folder("3.99")
    assert "apt-get install libpython3.99" in str(failure.value)


def test_free_ports_are_three_different_ones() -> None:
    ports = Ports.free()
    assert len({ports.grpc, ports.http, ports.metrics}) == 3
    ports.require_free()


def test_a_port_in_use_is_named_with_a_mend() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"HTTP port {port} on 127.0.0.1") as failure:
            Ports(Ports.free().grpc, port, Ports.free().metrics).require_free()
    assert failure.value.exit_code == 3
    assert "choose another port" in str(failure.value)


@pytest.mark.parametrize("same", [Ports(1, 1, 2), Ports(1, 2, 1), Ports(1, 2, 2)])
def test_two_of_three_ports_may_not_be_the_same(same) -> None:
    with pytest.raises(NvlmError, match="need three ports") as failure:
        same.require_free()
    assert failure.value.exit_code == 2
    assert "--http-port" in (failure.value.hint or "")


def test_an_empty_address_is_wrong_input() -> None:
    with pytest.raises(NvlmError, match="no address to listen on"):
        Ports(1, 2, 3, host="").require_free()


@pytest.mark.parametrize("host", ["a..b", "no.such.host.invalid", "300.1.1.1"])
def test_an_address_that_is_none_cannot_be_used(host) -> None:
    with pytest.raises(MachineError, match="cannot be used"):
        Ports(*(Ports.free().grpc, Ports.free().http, Ports.free().metrics), host=host).require_free()


def test_a_killed_group_is_gone_when_the_call_returns() -> None:
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(1, flush=True); time.sleep(60)"
    leader = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    leader.stdout.readline()
    kill_group(leader)
    with pytest.raises(ProcessLookupError):
        os.killpg(leader.pid, 0)


def test_memory_of_a_dead_starter_is_removed_and_no_other() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = SHARED_MEMORY / f"nvlm_{ended.pid}_0_region"
    alive = SHARED_MEMORY / f"nvlm_{os.getpid()}_test_region"
    dead.touch()
    alive.touch()
    remove_abandoned_memory()
    assert not dead.exists()
    assert alive.exists()
    remove_shared_memory(f"nvlm_{os.getpid()}_test")
    assert not alive.exists()


def test_ports_that_are_the_same_are_refused_before_anything_is_tried() -> None:
    with pytest.raises(NvlmError, match="need three ports, not 8001, 8001, 8002"):
        Ports(grpc=8001, http=8001).require_usable()
