#!/usr/bin/env bash
# dist.sh TARBALL FILE...: packs the program and, where it was built, the CUDA library (FILEs), stripped, with the shared
# libraries that a bare Linux lacks, their licenses and the demo. The program finds lib/ through its RPATH.
set -euo pipefail
tarball=$1
shift
name=$(basename "$tarball" .tar.gz) out=${tarball%.tar.gz}
newest=2.36 # of glibc: Debian 12's
rm -rf "$out" "$tarball"
mkdir -p "$out/lib" "$out/licenses"
for file in "$@"; do
    strip -o "$out/$(basename "$file")" "$file"
    chmod 755 "$out/$(basename "$file")"
done
mapfile -t libraries < <(scripts/shared_libraries.sh "$@")
install -m 755 -t "$out/lib" "${libraries[@]}"
install -m 644 -t "$out" README.md LICENSE THIRD_PARTY.md
install -m 644 -D -t "$out/models/demo" models/demo/*

# Whose libraries these are: each package's version (for its sources) and copyright.
for library in "${libraries[@]}"; do
    dpkg-query -S "$library" 2>/dev/null || dpkg-query -S "/usr$library" || dpkg-query -S "$(realpath "$library")"
done 2>/dev/null | cut -d: -f1 | sort -u | while read -r package; do
    dpkg-query -W -f '${source:Package} ${source:Version} (${binary:Package})\n' "$package" >>"$out/licenses/packages.txt"
    install -m 644 "/usr/share/doc/$package/copyright" "$out/licenses/$package"
done
[ -s "$out/licenses/packages.txt" ] || { echo "dist: the libraries belong to no packages of this system" >&2; exit 1; }

# A machine to build on that is too new makes a tarball that starts nowhere else.
for file in "$out"/gptd "$out"/*.so "$out"/lib/*; do
    [ -f "$file" ] || continue
    asked=$(objdump -T "$file" | grep -o 'GLIBC_[0-9.]*' | cut -c7- | sort -Vu | tail -n 1)
    [ "$(printf '%s\n' "$newest" "$asked" | sort -V | tail -n 1)" = "$newest" ] ||
        { echo "dist: $file asks for glibc $asked; $newest is the newest that may be: build on Debian 12" >&2; exit 1; }
done
tar -C "$(dirname "$out")" --sort=name --owner=0 --group=0 --numeric-owner -czf "$tarball" "$name"
echo "dist: $tarball, $(du -k "$tarball" | cut -f1) KiB; unpacked $(du -sm "$out" | cut -f1) MiB, for glibc $newest or later"
