#!/usr/bin/env bash
# gpu_bundle.sh BUILD: puts what a bare GPU machine needs into BUILD/gpu: the program, the CUDA library and the GPU tests,
# stripped, and the shared libraries that such a machine lacks (all but the C library's own and CUDA's).
set -euo pipefail
build=$1 out=$1/gpu
mkdir -p "$out/lib"
for file in "$build/gptd" "$build/libgptd_cuda.so" "$out"/test_* "$out"/bench_*; do
    [ -f "$file" ] || continue
    strip -o "$out/$(basename "$file").new" "$file"
    mv "$out/$(basename "$file").new" "$out/$(basename "$file")"
done
ldd "$out/gptd" | awk '$3 ~ /^\// {print $3}' | while read -r library; do
    case $(basename "$library") in
        libc.so*|libm.so*|libdl.so*|libpthread.so*|librt.so*|libgcc_s.so*|ld-linux*|libresolv.so*) ;;
        *) install -m 755 "$library" "$out/lib/" ;;
    esac
done
size=$(du -sm "$out" | cut -f1)
echo "gpu bundle: $out, $size MiB"
[ "$size" -le 40 ] || { echo "gpu bundle: more than 40 MiB" >&2; exit 1; }
