#!/usr/bin/env bash
# shared_libraries.sh FILE...: the shared libraries that these need and a bare Linux lacks, one path a line: all but the C
# library's own and CUDA's. libstdc++ and libgcc_s are among them.
set -euo pipefail
ldd "$@" | awk '$3 ~ /^\// {print $3}' | sort -u | while read -r library; do
    case $(basename "$library") in
        libc.so*|libm.so*|libmvec.so*|libdl.so*|libpthread.so*|librt.so*|libutil.so*|libresolv.so*|ld-linux*) ;;
        libcublas*|libcuda*) ;;
        *) echo "$library" ;;
    esac
done
