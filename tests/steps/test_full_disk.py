"""Whatever a step was about to make when the disk was full, it says so with a mend, and the same command goes on."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from nvlm_deploy.artifacts import digests
from nvlm_deploy.errors import MachineError
from nvlm_deploy.pipeline import State
from nvlm_deploy.profile import CalibrationChoice, load_profile
from nvlm_deploy.recipe import Recipe
from nvlm_deploy.steps.order import pipeline_of


class FullDisk:
    """A file system that has room for so many more folders and written files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
        self.folder, self.room, self.made = folder, room, 0
        self._patch(monkeypatch, os, "mkdir", lambda _mode=0o777, **_: True)
        self._patch(monkeypatch, io, "open", lambda mode="r", *_, **__: not set(mode).isdisjoint("wax+"))

    def _patch(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, writes: Any) -> None:
        original = getattr(module, name)

        def guarded(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(str(self.folder)) and writes(*args, **kwargs):
                self.made += 1
                if self.made > self.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, guarded)


def quantised(workspace: Path, checkpoint: Path) -> dict[str, str]:
    cpu = load_profile("cpu")
    decoder = cpu.decoder.model_copy(update={"quantization": "fp8_per_channel", "tensor_parallel": 2})
    data_free = cpu.model_copy(update={"decoder": decoder, "calibration": CalibrationChoice(samples=0)})
    recipe = Recipe(checkpoint, data_free, workspace)
    assert [state for _, state in pipeline_of(recipe, "quantize-llm").run()] == [State.BUILT]
    return digests(recipe.decoder_folder)


@pytest.mark.slow
@pytest.mark.needs("build")
def test_a_disk_that_is_full_at_any_file_is_said_with_its_place_and_gone_on_from(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace, its lock, the step's folder, its journal, rank files, config.json, manifest."""
    with monkeypatch.context() as patched:
        disk = FullDisk(patched, tmp_path / "whole", room=10**9)
        whole = quantised(tmp_path / "whole", tiny_folder)
    assert disk.made > 10
    beginning, end = range(12), range(disk.made - 6, disk.made)
    for room in sorted({*beginning, *end}):
        workspace = tmp_path / str(room)
        with monkeypatch.context() as patched:
            FullDisk(patched, workspace, room)
            with pytest.raises(MachineError, match="the disk is full") as refusal:
                quantised(workspace, tiny_folder)
        assert str(workspace) in refusal.value.message
        assert "run the same command again" in (refusal.value.hint or "")
        assert quantised(workspace, tiny_folder) == whole
