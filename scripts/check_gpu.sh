#!/usr/bin/env bash
# check_gpu.sh DIR: every GPU test of a bundle (make gpu-bundle), on a machine with a GPU, PyTorch and nothing of ours.
# Each part goes on after a failure of another; the summary comes last. PARTS chooses parts by name, TOOLS those of
# compute-sanitizer; LIMIT is the seconds that each of our programs may take.
set -uo pipefail
cd "$(dirname "$0")/.."
bundle=$(realpath "${1:-build/gpu}")
parts=${PARTS:-load ops steps experts sample deterministic model attention demo e2e sanitizer ptx}
# For our programs alone: Python has libraries of its own. cuBLASLt: the system's, the toolkit's, or PyTorch's.
blas=$(python3 -c 'import glob, nvidia, os
for path in nvidia.__path__:
    print(*{os.path.dirname(f) for f in glob.glob(path + "/**/libcublasLt.so*", recursive=True)}, sep=":")' 2>/dev/null | tail -n 1)
libraries=$bundle/lib:/usr/local/cuda/lib64:$blas:${LD_LIBRARY_PATH:-}
ours() { LD_LIBRARY_PATH=$libraries timeout "${LIMIT:-300}" "$@"; }
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
ops() {
    python3 tests/gpu/op_errors.py >"$bundle/op_errors.txt" && ours "$bundle/test_cuda_ops" "$bundle/op_errors.txt"
}
model() {
    python3 tests/gpu/reference_errors.py >"$bundle/reference_errors.txt" &&
        ours "$bundle/test_cuda_model" "$bundle/reference_errors.txt"
}
attention() {
    ours "$bundle/test_cuda_attention" && python3 tests/gpu/attention_check.py "$bundle/libgptd_cuda.so"
}
demo() {
    (LD_LIBRARY_PATH=$libraries exec timeout "${LIMIT:-300}" "$bundle/gptd" --model models/demo --backend cuda --port 8123 \
        --log-level warning) & # exec: the signal below must reach it
    local server=$!
    sleep 3
    python3 scripts/demo/measure.py --url http://127.0.0.1:8123 --check --sums 200 --repeats 1 --lengths 300 2040
    local rc=$?
    kill "$server"
    wait "$server"
    return $rc
}
e2e() {
    printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$libraries" "$bundle/gptd" >"$bundle/gptd-e2e"
    chmod +x "$bundle/gptd-e2e"
    timeout "${LIMIT:-570}" python3 tests/e2e/run.py --server "$bundle/gptd-e2e" --backend cuda
}
# Races and the rest are looked for in our own kernels, whose names end so; addresses in cuBLASLt's, too, which get ours.
sanitizer() {
    local tool suite begin rc=0 program
    program=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
        local only=(--kernel-name kns=_kernel) ours_alone=(env CK_RUN_CASE=cuda_ops)
        [ $tool = memcheck ] && only=() ours_alone=() # the other tools fail in cuBLASLt's products
        for suite in ops steps experts sample attention; do
            begin=$SECONDS
            echo "-- $tool, $suite"
            [ $suite = ops ] || ours_alone=()
            GPTD_TEST_SHORT=1 ours "${ours_alone[@]}" "$program" --tool $tool --error-exitcode 1 "${only[@]}" \
                "$bundle/test_cuda_$suite" || rc=1
            echo "-- $tool, $suite: $((SECONDS - begin)) s"
        done
    done
    return $rc
}
# What GPUs later than this one run: the PTX, compiled by the driver. cuBLASLt brings none for every GPU: no products.
ptx() {
    local rc=0 jit=(env -u CUDA_CACHE_DISABLE CUDA_FORCE_PTX_JIT=1 GPTD_TEST_SHORT=1)
    ours "${jit[@]}" CK_RUN_CASE=cuda_ops "$bundle/test_cuda_ops" || rc=1
    ours "${jit[@]}" "$bundle/test_cuda_steps" || rc=1
    ours "${jit[@]}" "$bundle/test_cuda_experts" || rc=1
    ours "${jit[@]}" "$bundle/test_cuda_sample" || rc=1
    ours "${jit[@]}" "$bundle/test_cuda_attention" || rc=1
    return $rc
}
failed=0
step load ours "$bundle/test_cuda_load"
step ops ops
step steps ours "$bundle/test_cuda_steps"
step experts ours "$bundle/test_cuda_experts"
step sample ours "$bundle/test_cuda_sample"
step deterministic ours "$bundle/test_cuda_deterministic"
step model model
step attention attention
step demo demo
step e2e e2e
step sanitizer sanitizer
step ptx ptx
printf '\n%s' "$summary"
exit $failed
