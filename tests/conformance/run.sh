#!/usr/bin/env bash
# Transformers' own common tests on our forms: `run.sh [pytest arguments]`. They are judged by reference.json, the outcomes
# of Hugging Face's own classes; `run.sh --reference` records it anew, and where another version of transformers is
# installed its reference is recorded first. Downloads and records lie in .hfsuite, once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python}

suite=$("$python" "$here/prepare.py" "$root/.hfsuite")
version=${suite##*-}
export PYTHONPATH="$suite:$here:$here/standins:${PYTHONPATH:+$PYTHONPATH:}$root/src" PYTHONDONTWRITEBYTECODE=1
export CONFORMANCE_SUITE="$suite"  # read by standins/tests
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
# One thread a process, on the CPU: the outcomes do not depend on the machine's other hardware
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES=
cd "$here"

run() { # run forms|reference [pytest arguments]
    CONFORMANCE=$1 "$python" -m pytest -c suite.ini "${@:2}" test_conformance.py
}

export CONFORMANCE_REFERENCE="$here/reference.json"
if [ "${1:-}" = --reference ]; then
    run reference "${@:2}"
    exit
fi
if ! grep -q "\"transformers\": \"$version\"" "$CONFORMANCE_REFERENCE"; then
    export CONFORMANCE_REFERENCE="$root/.hfsuite/reference-$version.json"
    [ -f "$CONFORMANCE_REFERENCE" ] || run reference
fi
run forms "$@"
