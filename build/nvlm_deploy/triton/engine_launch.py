"""A server of TensorRT-LLM's engines: the container's own tritonserver, one process for each rank under mpirun.

As Triton's own script starts it (triton_backend/scripts/launch_triton_server.py, "leader mode"; contract C.5).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from nvlm_deploy.errors import MachineError
from nvlm_deploy.llm.engine_tool import CONTAINERS_HINT
from nvlm_deploy.triton.decoder import DECODER
from nvlm_deploy.triton.engine_fit import EngineFacts

CONTAINERS_SERVER = Path("/opt/tritonserver/bin/tritonserver")
MPIRUN = "mpirun"
# one request's table on its way to the decoder, and the next one's
_TABLES_IN_FLIGHT = 2
_TABLE_ELEMENT_BYTES = 2


def engine_command(server: Sequence[str], facts: EngineFacts, *, memory_name: str, mpirun: str = MPIRUN) -> list[str]:
    """Rank 0 has all models, every other rank the decoder alone; `server` is tritonserver with its arguments.

    To be run in the repository's folder, for the decoder's config.pbtxt names the engines' folder from there. The
    encoder's embeddings stay on GPU 0, in a pool that holds them.
    """
    rows = facts.prompt_table_rows // facts.max_batch_size
    pool_bytes = _TABLES_IN_FLIGHT * rows * facts.hidden_size * _TABLE_ELEMENT_BYTES
    ranks = [[*server, f"--cuda-memory-pool-byte-size=0:{pool_bytes}"]]
    for _ in range(1, facts.world_size):
        ranks.append([*server, "--model-control-mode=explicit", f"--load-model={DECODER}"])
    for rank, words in enumerate(ranks):
        words.append(f"--backend-config=python,shm-region-prefix-name={memory_name}{rank}_")
    if facts.world_size == 1:
        return ranks[0]
    command = [mpirun, "--allow-run-as-root"]
    for words in ranks:
        command += ["-n", "1", *words, ":"]
    return command[:-1]


def require_engine_server(facts: EngineFacts) -> tuple[Path, str]:
    """tritonserver and mpirun of this container. Raises MachineError naming what is missing."""
    server = CONTAINERS_SERVER if CONTAINERS_SERVER.is_file() else shutil.which("tritonserver")
    mpirun = shutil.which(MPIRUN)
    if server is None:
        raise MachineError("no tritonserver here that runs TensorRT-LLM's engines", hint=CONTAINERS_HINT)
    if mpirun is None and facts.world_size > 1:
        raise MachineError(f"no {MPIRUN} here: {facts.world_size} ranks are started by it", hint=CONTAINERS_HINT)
    return Path(server), mpirun or MPIRUN
