"""The program of one rank's child process: `python -P engine_one_rank.py RANK --checkpoint_dir ...`.

trtllm-build has no flag for a single rank: it builds all of them in one process, where memory is not given back between
ranks, or in a pool (`--workers`), where the death of a worker is told without its cause. Its `parallel_build` is the
one place that shares out ranks and `build_and_save` builds one (tensorrt_llm/commands/build.py, read at commits of 1.0
and 1.2; `nvlm doctor --container` looks whether they are there). So its own `main` runs, its own flags hold, and only
the sharing out is replaced. Runs with the container's Python: only the standard library and tensorrt_llm are used.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

MODULE = "tensorrt_llm.commands.build"
# the parameters that are relied on, in this order
PARALLEL_BUILD = ("model_config", "ckpt_dir", "build_config", "output_dir", "workers", "log_level", "model_cls")
BUILD_AND_SAVE = (
    "rank",
    "gpu_id",
    "ckpt_dir",
    "build_config",
    "output_dir",
    "log_level",
    "model_config",
    "model_cls",
)


def main(rank: int, arguments: list[str]) -> None:
    """Run trtllm-build with these arguments for one rank, on the only GPU that CUDA_VISIBLE_DEVICES shows."""
    tool: Any = importlib.import_module(MODULE)

    def only_this_rank(
        model_config: Any,
        ckpt_dir: str | None,
        build_config: Any,
        output_dir: str,
        workers: int = 1,
        log_level: str = "info",
        model_cls: Any = None,
        **options: Any,
    ) -> None:
        del workers  # one rank needs no sharing out
        tool.build_and_save(rank, 0, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **options)

    for name in ("parallel_build", "build_and_save"):
        if not hasattr(tool, name):
            sys.exit(f"{MODULE} has no {name}: this TensorRT-LLM cannot build one rank alone")
    tool.parallel_build = only_this_rank
    sys.argv = ["trtllm-build", *arguments]
    tool.main()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
