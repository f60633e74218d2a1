#!/usr/bin/env bash
# PEFT's own tests on our forms: `run.sh [pytest arguments]`. They are judged by reference.json, the outcomes of the models
# that PEFT itself tests; `run.sh --reference` records it anew, and where another version of PEFT is installed its reference
# is recorded first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

run() {
    local models="$root/.hfsuite/peft-$SUITE"
    "$python" "$here/models.py" "$SUITE" "$models"
    (cd "$models" && "$python" -m pytest -c "$here/suite.ini" --rootdir "$suite" "$@" \
        "$suite"/tests/test_{decoder,encoder_decoder,feature_extraction}_models.py)
}

source "$here/../conformance/suite.sh" peft "$@"
