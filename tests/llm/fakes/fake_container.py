"""Lays the fake TensorRT-LLM (README.md) out as a container would: on PATH, importable, with a version."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

SITE = Path(__file__).parent / "site"


class FakeContainer:
    """A folder with bin/trtllm-build and the packages behind it; visible to child processes only."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.bin, self.state = (folder / name for name in ("site", "bin", "state"))
        self.monkeypatch = monkeypatch
        shutil.copytree(SITE, self.site, ignore=shutil.ignore_patterns("__pycache__"))
        self.bin.mkdir()
        self.state.mkdir()
        self.executable = self.script(
            "trtllm-build", "import sys\nfrom tensorrt_llm.commands.build import main\nsys.exit(main())\n"
        )
        # the real tool lies where its Python does; so does ours, and nothing else of this machine's PATH
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv("PYTHONPATH", str(self.site))
        monkeypatch.setenv("FAKE_TRTLLM_STATE", str(self.state))
        self.version("1.2.1")
        self.triton("26.07", "2.73.0")

    def script(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!{sys.executable}\n{body}")
        path.chmod(0o755)
        return path

    def version(self, version: str) -> None:
        for old in self.site.glob("*.dist-info"):
            shutil.rmtree(old)
        info = self.site / f"tensorrt_llm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")

    def tensorrt(self, version: str) -> None:
        self.monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)

    def triton(self, container: str, version: str) -> None:
        self.script("tritonserver", "")
        self.monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", container)
        self.monkeypatch.setenv("TRITON_SERVER_VERSION", version)

    def orders(self, **orders: Any) -> None:
        self.monkeypatch.setenv("FAKE_TRTLLM", json.dumps(orders))

    def edit(self, file: str, old: str, new: str) -> None:
        """Another release, in which something is different."""
        path = self.site / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
