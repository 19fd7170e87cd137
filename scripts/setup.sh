#!/bin/sh
# Installs what `make run` (setup.sh run), `make check` (setup.sh check) or `make check-clients` (setup.sh clients) needs and
# this machine lacks, by package name.
# Debian 12 and Ubuntu 24.04. Says what it installs; uses sudo when not root. Does nothing when nothing is missing.
set -eu
cd "$(dirname "$0")/.."

packages="gcc g++ libc6-dev make pkg-config curl libmicrohttpd-dev libgnutls28-dev libcjson-dev libsentencepiece-dev"
packages="$packages libpcre2-dev libutf8proc-dev"
if [ "${1:-run}" = check ]; then
    # Sanitizers and fuzzing need clang's runtime; the end-to-end tests are Python.
    packages="$packages check clang libclang-rt-dev python3 python3-venv"
    # The Dockerfile is tried in a fresh Debian, TLS with a certificate made for it.
    packages="$packages mmdebstrap openssl"
    # The page's tests run in Chromium. Ubuntu has it as a snap alone: without one they are skipped there.
    ! grep -qs '^ID=debian$' /etc/os-release || packages="$packages chromium"
fi
[ "${1:-run}" != clients ] || packages="$packages python3 python3-venv"

missing=""
if command -v dpkg-query >/dev/null 2>&1; then
    for p in $packages; do
        dpkg-query -W -f='${Status}\n' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
    done
else
    for p in libmicrohttpd gnutls libcjson sentencepiece libpcre2-8 libutf8proc; do
        pkg-config --exists $p 2>/dev/null || missing="$missing $p"
    done
    [ -z "$missing" ] && exit 0
    echo "setup: this system has no apt. Install the equivalents of these Debian packages:$packages" >&2
    exit 1
fi

if [ -n "$missing" ]; then
    echo "setup: installing$missing"
    as_root=""
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null 2>&1 || { echo "setup: not root and no sudo: install$missing yourself" >&2; exit 1; }
        as_root=sudo
    fi
    log=$(mktemp)
    if ! { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y \
           --no-install-recommends $missing; } >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        echo "setup: apt-get failed (above); missing:$missing" >&2
        exit 1
    fi
    rm -f "$log"
fi

# A virtual environment of the build's own: $1 its directory, $2 the packages, $3 what shows that they are there.
install_python_packages() {
    "$1/bin/python" -c "import $3" 2>/dev/null && return
    echo "setup: installing the Python packages $2 into $1"
    mkdir -p build
    [ -x "$1/bin/pip" ] || for python in python3 /usr/bin/python3; do
        "$python" -m venv "$1" && break
    done
    "$1/bin/pip" install --quiet --disable-pip-version-check $2 && return
    echo "setup: pip could not install $2: the tests with them cannot run" >&2
    return 1
}

# What the tests hold ours against: the official OpenAI client, LangChain's, schemathesis, Hugging Face's tokenizers,
# Python's Jinja2, Kubernetes' schemas, and chat templates of models (files of trl, of which nothing is imported).
if [ "${1:-run}" = check ]; then
    failed=""
    install_python_packages build/venv "openai tokenizers jinja2" "openai, tokenizers, jinja2" || failed=1
    install_python_packages build/venv "langchain-openai schemathesis" "langchain_openai, schemathesis" || failed=1
    install_python_packages build/venv "pyyaml kubernetes-validate" "yaml, kubernetes_validate" || failed=1
    install_python_packages build/venv "--no-deps trl" "importlib.util as i; assert i.find_spec('trl')" || failed=1
    [ -z "$failed" ] || [ -z "${CI:-}" ] # elsewhere they are skipped, and counted as such
fi

# Proxies and Prometheus, of the distribution, for tests: unpacked, not installed, so that nothing of them is started.
if [ "${1:-run}" = check ] && [ ! -e build/tools/complete ] && command -v apt-get >/dev/null 2>&1; then
    echo "setup: unpacking haproxy, nginx and prometheus into build/tools"
    rm -rf build/tools && mkdir -p build/tools/packages
    programs="haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 nginx prometheus"
    if (cd build/tools/packages && apt-get download -q $programs) >build/tools/log 2>&1; then
        for package in build/tools/packages/*.deb; do dpkg-deb -x "$package" build/tools; done
        touch build/tools/complete
    else
        cat build/tools/log >&2
        echo "setup: apt-get could not download them: the tests with them are skipped" >&2
        [ -z "${CI:-}" ]
    fi
    rm -rf build/tools/packages
fi

# Clients that bring much with them: 1.3 GB.
if [ "${1:-run}" = clients ]; then
    install_python_packages build/clients "openai litellm lm_eval[api] transformers sentencepiece protobuf gradio" \
        "openai, litellm, lm_eval.models.openai_completions, transformers, sentencepiece, google.protobuf, gradio"
fi
