#!/usr/bin/env bash
# gpu_bundle.sh BUILD: puts what a bare GPU machine needs into BUILD/gpu: the program, the CUDA library and the GPU tests,
# stripped, and the shared libraries that such a machine lacks.
set -euo pipefail
build=$1 out=$1/gpu
mkdir -p "$out/lib"
for file in "$build/gptd" "$build/libgptd_cuda.so" "$out"/test_* "$out"/bench_*; do
    [ -f "$file" ] || continue
    strip -o "$out/$(basename "$file").new" "$file"
    mv "$out/$(basename "$file").new" "$out/$(basename "$file")"
done
scripts/shared_libraries.sh "$build/gptd" | xargs install -m 755 -t "$out/lib"
size=$(du -sm "$out" | cut -f1)
echo "gpu bundle: $out, $size MiB"
[ "$size" -le 40 ] || { echo "gpu bundle: more than 40 MiB" >&2; exit 1; }
