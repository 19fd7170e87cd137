#!/usr/bin/env bash
# check_gpu.sh DIR: every GPU test of a bundle (make gpu-bundle), on a machine with a GPU, PyTorch and nothing of ours.
# Each step goes on after a failure of another; the summary comes last. PARTS chooses steps, by name.
set -uo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-build/gpu}
parts=${PARTS:-ops sample model attention demo}
# For our programs alone: Python has libraries of its own. cuBLASLt: the system's, the toolkit's, or PyTorch's.
blas=$(python3 -c 'import glob, nvidia, os
for path in nvidia.__path__:
    print(*{os.path.dirname(f) for f in glob.glob(path + "/**/libcublasLt.so*", recursive=True)}, sep=":")' 2>/dev/null | tail -n 1)
libraries=$(realpath "$bundle")/lib:/usr/local/cuda/lib64:$blas
ours() { LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-} timeout "${LIMIT:-300}" "$@"; }
summary=""
step() { # name command...
    local name=$1 begin=$SECONDS
    shift
    [[ " $parts " == *" $name "* ]] || return 0
    echo "== $name"
    if "$@"; then summary+="$name: passed, $((SECONDS - begin)) s"$'\n'
    else summary+="$name: FAILED, $((SECONDS - begin)) s"$'\n'; failed=1
    fi
}
model() {
    python3 tests/gpu/reference_errors.py >"$bundle/reference_errors.txt" &&
        ours "$bundle/test_cuda_model" "$bundle/reference_errors.txt"
}
demo() {
    ours "$bundle/gptd" --model models/demo --backend cuda --port 8123 --log-level warning &
    local server=$!
    sleep 3
    python3 scripts/demo/measure.py --url http://127.0.0.1:8123 --check --sums 200 --repeats 1 --lengths 300 2040
    local rc=$?
    kill "$server"
    wait "$server"
    return $rc
}
failed=0
step ops ours "$bundle/test_cuda_ops"
step sample ours "$bundle/test_cuda_sample"
step model model
step attention python3 tests/gpu/attention_check.py "$bundle/libgptd_cuda.so"
step demo demo
printf '\n%s' "$summary"
exit $failed
