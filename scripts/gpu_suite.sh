#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test and measure everything, the most valuable first, in 390 seconds, and write
# benchmarks/results/gpu-<name of the GPU>.{jsonl,json,md}. Without a GPU: rehearse the parts that do not need one.
# docs/gpu.md says what each section answers. scripts/gpu_pack.sh takes libraries and wheels along in .gpu/.
# Usage: scripts/gpu_suite.sh [--plan second] [--seconds 390] [--output PREFIX] [--sections smoke parity ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
if compgen -G ".gpu/wheels/*.whl" >/dev/null; then
  wheels=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$wheels" .gpu/wheels/*.whl
  export PYTHONPATH="$wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
if [[ -d .gpu/lib ]]; then
  # A copy that belongs to this user: a library that others could have changed is not loaded.
  libraries=$(mktemp -d)
  cp -r .gpu/lib/. "$libraries"
  chmod -R go-w "$libraries"
  export VIM_GPU_LIBRARIES="$libraries" VIM_PREBUILT="${VIM_PREBUILT:-$libraries/base}"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m scripts.gpu.suite "$@"
