#!/usr/bin/env bash
# Transformers' own common tests on our forms: `run.sh [pytest arguments]`. They are judged by reference.json, the outcomes
# of Hugging Face's own classes; `run.sh --reference` records it anew, and where another version of transformers is
# installed its reference is recorded first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

run() {
    (cd "$here" && SUITE_TESTS="$suite" PYTHONPATH="$PYTHONPATH:$here/standins" \
        "$python" -m pytest -c suite.ini "$@" test_conformance.py)
}

source "$here/suite.sh" transformers "$@"
