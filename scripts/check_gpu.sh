#!/usr/bin/env bash
# check_gpu.sh DIR: every GPU test of a bundle (make gpu-bundle), on a machine with a GPU, PyTorch and nothing of ours.
# Each step goes on after a failure of another; the summary comes last. PARTS chooses steps, by name.
set -uo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-build/gpu}
parts=${PARTS:-ops sample model attention demo}
export LD_LIBRARY_PATH=$(realpath "$bundle")/lib:${LD_LIBRARY_PATH:-}
# cuBLASLt as PyTorch brings it, where the system has none of its own.
if ! ldconfig -p | grep -q libcublasLt; then
    blas=$(python3 -c 'import glob, nvidia, os
print(os.path.dirname(glob.glob(list(nvidia.__path__)[0] + "/**/libcublasLt.so*", recursive=True)[0]))' 2>/dev/null)
    export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$blas
fi
export GPTD_CUDA_LIBRARY=$(realpath "$bundle")/libgptd_cuda.so
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
demo() {
    "$bundle/gptd" --model models/demo --backend cuda --port 8123 --log-level warning &
    local server=$!
    sleep 3
    python3 scripts/demo/measure.py --url http://127.0.0.1:8123 --check --sums 200 --repeats 1 --lengths 300 2040
    local rc=$?
    kill "$server"
    wait "$server"
    return $rc
}
failed=0
step ops "$bundle/test_cuda_ops"
step sample "$bundle/test_cuda_sample"
step model "$bundle/test_cuda_model"
step attention python3 tests/gpu/attention_check.py "$GPTD_CUDA_LIBRARY"
step demo demo
printf '\n%s' "$summary"
exit $failed
