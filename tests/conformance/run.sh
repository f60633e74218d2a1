#!/usr/bin/env bash
# Transformers' own common tests on our forms: `run.sh [pytest arguments]`; `run.sh --reference` runs them on Hugging
# Face's classes instead and records the outcomes in reference.json. What it downloads lies in .hfsuite, once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python}

export CONFORMANCE=forms CONFORMANCE_REFERENCE="$here/reference.json"
if [ "${1:-}" = --reference ]; then
    export CONFORMANCE=reference
    shift
fi
suite=$("$python" "$here/prepare.py" "$root/.hfsuite")
export PYTHONPATH="$suite:$here:$here/standins:${PYTHONPATH:+$PYTHONPATH:}$root/src"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
# One thread a process, on the CPU: the outcomes and the time do not depend on the machine's other hardware
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES=
cd "$here"
exec "$python" -m pytest -c suite.ini "$@" test_conformance.py
