# How a library's own tests judge our forms, by the outcomes of the library's own models. A suite sources it with the name of
# the package and the arguments of its run.sh, after it has defined
#     here                      its folder, which holds reference.json
#     run [pytest arguments]    runs the tests that lie in $suite, by $python, on what $SUITE names: forms or reference
# Downloads, and the references of other versions than the recorded one, lie in .hfsuite.

package=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}

suite=$("$python" "$root/tests/conformance/prepare.py" "$package" "$root/.hfsuite")
export PYTHONPATH="$suite:$here:$root/tests/conformance:${PYTHONPATH:+$PYTHONPATH:}$root/src" PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
# One thread a process, on the CPU: the outcomes do not depend on the machine's other hardware
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES=

export SUITE=reference SUITE_REFERENCE="$here/reference.json"
if [ "${2:-}" = --reference ]; then
    run "${@:3}"
    exit
fi
if ! grep -qs "\"$package\": \"${suite##*-}\"" "$SUITE_REFERENCE"; then
    SUITE_REFERENCE="$root/.hfsuite/reference-$(basename "$suite").json"
    # A reference may fail in some tests; it is one if it was recorded
    [ -f "$SUITE_REFERENCE" ] || run || [ -f "$SUITE_REFERENCE" ]
fi
SUITE=forms
run "${@:2}"
