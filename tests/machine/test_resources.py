"""What a program may use of this machine."""

from __future__ import annotations

import pytest

from nvlm_deploy.machine import resources


def test_a_containers_limit_counts_where_it_is_lower_and_its_file_cache_is_free(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\nMemAvailable:    800 kB\n")
    assert resources.available_memory(meminfo, tmp_path / "none") == 800 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\ninactive_file 100000\n")
    assert resources.available_memory(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    assert resources.available_memory(meminfo, tmp_path) == 300_000


@pytest.mark.parametrize(
    ("variable", "names"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("2, 5", ["2", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])],
)
def test_a_child_is_given_its_gpu_by_the_name_this_process_sees_it_under(variable, names):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert resources.device_names(2, environment) == names


def test_this_machine_has_memory(monkeypatch):
    assert resources.this_machine().available_bytes > 1 << 28
