"""Triton model `vision_encoder`: uint8 tiles become rows of the decoder's prompt embedding table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nvlm_deploy.serving import backend
from nvlm_deploy.serving.engine import open_engine
from nvlm_deploy.serving.settings import ServingSettings
from nvlm_deploy.tensors import PROMPT_EMBEDDING_TABLE, PROMPT_VOCAB_SIZE, TILES

if TYPE_CHECKING:
    import torch


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine beside `model.py` and run it once: the first request should not pay for imports."""
        backend.set_up_logging()
        settings = ServingSettings(args)
        self.hidden_size = settings.integer("hidden_size")
        self.max_tiles_per_run = settings.integer("max_tiles_per_run")
        self.engine = open_engine(settings.folder, settings.text("runtime"), threads=settings.integer("threads"))
        size = self.engine.tile_size
        self._prompt_table(self._rows(np.zeros((1, size, size, 3), dtype=np.uint8)))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a failing one fails alone."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        try:
            if request.is_cancelled():
                return backend.cancelled_response()
            return self._prompt_table(self._rows(backend.required_array(request, TILES)))
        except Exception as problem:
            return backend.error_response(problem)

    def _rows(self, tiles: NDArray[Any]) -> torch.Tensor:
        """[rows, hidden]: all tokens of all tiles, in order.

        A text-only request has no tiles and runs no engine. It still gets one row, to which no id refers: a table
        without rows is not known to be legal for the C++ backend, and an ensemble step cannot be left out.
        """
        import torch

        if len(tiles) == 0:
            return torch.zeros(1, self.hidden_size)
        starts = range(0, len(tiles), self.max_tiles_per_run)
        runs = [self.engine(tiles[start : start + self.max_tiles_per_run]) for start in starts]
        return torch.cat(runs).reshape(-1, self.hidden_size)

    def _prompt_table(self, rows: torch.Tensor) -> Any:
        """BF16 has no numpy form; it leaves by DLPack."""
        import torch

        utils = backend.backend_module()
        table = rows.to(torch.bfloat16)[None]
        count = np.array([[len(rows)]], dtype=np.int32)
        return utils.InferenceResponse(
            [
                utils.Tensor.from_dlpack(PROMPT_EMBEDDING_TABLE.name, table),
                utils.Tensor(PROMPT_VOCAB_SIZE.name, count),
            ]
        )
