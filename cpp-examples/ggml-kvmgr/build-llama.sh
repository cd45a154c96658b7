#!/bin/sh
# Obtains an unmodified llama.cpp from the sdist of llama-cpp-python and builds the programs that the
# tests of the plugin run. Everything stays in $LLAMA (default ~/.cache/kvmgr-llama); a second run
# finds it there. Needs python3 with venv, a C++ compiler, about 80 MB of download and, on 2 cores,
# a quarter of an hour.
set -eu
VERSION=0.3.36
LLAMA=${LLAMA:-${XDG_CACHE_HOME:-$HOME/.cache}/kvmgr-llama}
mkdir -p "$LLAMA"
cd "$LLAMA"
[ -f built-$VERSION ] && { echo "llama.cpp is built in $LLAMA"; exit 0; }

[ -x venv/bin/cmake ] || { python3 -m venv venv && venv/bin/pip install -q cmake ninja scikit_build_core gguf; }
[ -d sd ] || venv/bin/pip download -q --no-binary :all: --no-deps --no-build-isolation \
  llama-cpp-python==$VERSION -d sd
[ -d src/vendor ] || { mkdir -p src && tar xzf sd/*.tar.gz -C src --strip-components=1; }
venv/bin/cmake -S src/vendor/llama.cpp -B build -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/venv/bin/ninja" \
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
venv/bin/ninja -C build -j"${JOBS:-2}" ggml-cpu llama-perplexity llama-bench llama-completion \
  llama-server llama-cli test-backend-ops test-save-load-state
touch built-$VERSION
