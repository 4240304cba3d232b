#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test and measure everything in one call of less than nine minutes, and write
# benchmarks/results/gpu-<name of the GPU>.{json,md}. Without a GPU: rehearse the parts that do not need one.
# Usage: scripts/gpu_suite.sh [--seconds 520] [--output PREFIX] [--sections build parity kernels ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu_suite.py "$@"
