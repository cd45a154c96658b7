#!/usr/bin/env bash
# Builds, checks and times the CUDA kernels on a machine with a GPU; under ten minutes.
# Needs python3 with numpy and torch; uses cargo and compute-sanitizer where they are.
set -uo pipefail
cd "$(dirname "$0")"
failed=0
step() { echo "== $*"; "$@" || { echo "FAILED: $*"; failed=1; }; }

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step python3 check.py
if command -v compute-sanitizer >/dev/null; then
  step compute-sanitizer --error-exitcode 1 --tool memcheck python3 check.py --quick
  step compute-sanitizer --error-exitcode 1 --tool racecheck python3 check.py --quick
else
  echo "SKIP: compute-sanitizer is not installed"
fi
step python3 bench.py "$@"
step python3 bench.py --flex --heads 1 --formats "" --points 1x16384,16x4096,64x4096
step python3 prefill.py
if command -v cargo >/dev/null; then
  step cargo test --manifest-path ../../Cargo.toml --test cuda_host
  step make -C ../.. examples
else
  echo "SKIP: cargo is not installed, so the library itself is not checked here"
fi
exit $failed
