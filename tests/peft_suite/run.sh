#!/usr/bin/env bash
# PEFT's own tests on our forms: `run.sh [pytest arguments]`. They are judged by reference.json, the outcomes of the models
# that PEFT itself tests; `run.sh --reference` records it anew, and where another version of PEFT is installed its reference
# is recorded first. Downloads, models and records lie in .hfsuite.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python}

suite=$("$python" "$here/prepare.py" "$root/.hfsuite")
version=${suite##*-}
export PYTHONPATH="$suite:$here:$root/tests/conformance:${PYTHONPATH:+$PYTHONPATH:}$root/src" PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
# One thread a process, on the CPU: the outcomes do not depend on the machine's other hardware
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES=

run() { # run forms|natives [pytest arguments]
    local models="$root/.hfsuite/peft-$1"
    "$python" "$here/models.py" "$1" "$models"
    (cd "$models" && PEFT_SUITE=$1 "$python" -m pytest -c "$here/suite.ini" --rootdir "$suite" "${@:2}" \
        "$suite"/tests/test_{decoder,encoder_decoder,feature_extraction}_models.py)
}

export PEFT_SUITE_REFERENCE="$here/reference.json"
if [ "${1:-}" = --reference ]; then
    run natives "${@:2}"
    exit
fi
if ! grep -qs "\"peft\": \"$version\"" "$PEFT_SUITE_REFERENCE"; then
    export PEFT_SUITE_REFERENCE="$root/.hfsuite/peft-reference-$version.json"
    [ -f "$PEFT_SUITE_REFERENCE" ] || run natives || [ -f "$PEFT_SUITE_REFERENCE" ]
fi
run forms "$@"
