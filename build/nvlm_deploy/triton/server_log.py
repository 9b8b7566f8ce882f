"""What a server's log says, without what it always says."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

TAIL_LINES = 12
_MOST_CHARACTERS = 400
# tables, information, and the import machinery inside tracebacks
_DULL_LINES = ("+-", "| ", "I", "At:", "  <frozen")
# what the bundled server (2.51) says wherever there is no GPU, while all is well
_WITHOUT_GPU = re.compile(
    r"(pinned|cuda)_memory_manager\.cc|CudaDriverHelper has not been initialized|initialize NVML|DCGM"
    r"|unable to create stream for \S+: CUDA driver|cuda.*(insufficient for CUDA runtime|no CUDA-capable device)",
    re.IGNORECASE,
)
_FAILED = re.compile(
    r"failed to load '([^']+)' version \d+: (?:Internal: |Invalid argument: )?(.*?)(?:\\n\\nAt:.*)?\"?$"
)


class ServerLog:
    """The log of one server."""

    def __init__(self, path: Path, *, needs_gpu: bool = False, links: Mapping[Path, Path] | None = None) -> None:
        """`needs_gpu` keeps its complaints of a missing one; `links` are shown as what they lead to."""
        self.path = path
        self._needs_gpu = needs_gpu
        self._links = links or {}

    def tail(self) -> str:
        """The last lines that say something."""
        lines = collections.deque(self._telling_lines(), maxlen=TAIL_LINES)
        return "".join(f"{line[:_MOST_CHARACTERS].rstrip()}\n" for line in lines)

    def failed_models(self) -> dict[str, str]:
        """The models that did not load, each with the reason that Triton gives."""
        found = (_FAILED.search(line.rstrip()) for line in self._telling_lines())
        return {match[1]: match[2].strip()[:_MOST_CHARACTERS] for match in found if match}

    def _telling_lines(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", errors="replace") as log:
            for line in log:
                if not line.strip() or line.startswith(_DULL_LINES):
                    continue
                if self._needs_gpu or not _WITHOUT_GPU.search(line):
                    yield self._with_real_paths(line)

    def _with_real_paths(self, line: str) -> str:
        for link, target in self._links.items():
            line = line.replace(str(link), str(target))
        return line
