#!/usr/bin/env bash
# check_dist.sh TARBALL: unpacks it beside the C library alone, in a root with nothing else, and asks the demo over HTTP.
set -euo pipefail
root=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server"; } || true
    rm -rf "$root"
}
trap finish EXIT
die() { echo "check-dist: $1" >&2; [ ! -f "$root/log" ] || cat "$root/log" >&2; exit 1; }

tar -C "$root" -xzf "$1"
place=$(basename "$1" .tar.gz)
loader=$(readelf -l "$root/$place/gptd" | sed -n 's/.*interpreter: \(.*\)\]/\1/p')
for file in "$loader" $(ldd "$root/$place/gptd" | awk '$3 ~ /\/lib(c|m|dl|pthread|rt)\.so/ {print $3}'); do
    install -D "$file" "$root$file"
done
# The loader asks /proc for the program's place, and here there is none.
mkdir -p "$root/proc/self"
ln -s "/$place/gptd" "$root/proc/self/exe"

if [ "$(id -u)" = 0 ]; then bare=(chroot "$root")
elif unshare -r true 2>/dev/null; then bare=(unshare -r chroot "$root")
else
    echo "check-dist: skipped: neither root nor user namespaces here"
    [ -z "${CI:-}" ] # there it must run
    exit
fi
command=(env -i "PATH=$PATH" "${bare[@]}" "/$place/gptd" --model "/$place/models/demo" --port 0)

touch "$root/log" # it is read before the background has opened it
"${command[@]}" 2>>"$root/log" &
server=$!
for _ in $(seq 100); do
    port=$(sed -n 's/.*ready after.*:\([0-9]*\)$/\1/p' "$root/log")
    [ -z "$port" ] || break
    kill -0 "$server" 2>/dev/null || die "it ended"
    sleep 0.1
done
[ -n "$port" ] || die "it is not ready after 10 s"
answer=$(curl -sS --max-time 20 "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "demo", "prompt": "12+30=", "max_tokens": 4, "temperature": 0, "stop": "\n"}')
[[ $answer == *'"text":"42"'* ]] || die "not the answer to 12+30=: $answer"
kill "$server"
wait "$server" || die "it ended with $?"
server=

# Without cuBLASLt and a driver the CUDA library is refused by name, and says what to do.
if [ -f "$root/$place/libgptd_cuda.so" ]; then
    status=0
    "${command[@]}" --backend cuda 2>"$root/log" || status=$?
    [ "$status" = 3 ] && grep -q 'libcublasLt.so.*LD_LIBRARY_PATH' "$root/log" || die "--backend cuda ended with $status"
fi
echo "check-dist: $(basename "$1") answers beside the C library alone"
