#!/usr/bin/env bash
# Prepare .gpu/, which scripts/gpu_suite.sh uses on a machine with a GPU and without a network: kernels built for one
# architecture with the PyTorch at hand (the stable ABI fits others), and timm's wheel. Run it again after every change
# in csrc/: libraries of other sources are not used, and building them there takes a minute of the GPU's time.
# Usage: scripts/gpu_pack.sh [--architecture 9.0] [--variant NAME=FLAGS ...]
# A variant is a library whose kernels nvcc compiles with more flags, such as few=-DVIM_FORWARD_THREADS=256; the second
# plan of the suite compares variants. PYTHON chooses the Python, CXX the C++ compiler, CUDA_HOME the toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

architecture=9.0 variants=()
while (($#)); do
  case $1 in
    --architecture) architecture=${2:?an architecture such as 9.0} && shift 2 ;;
    --variant) [[ ${2:-} == ?*=?* ]] || { echo "--variant takes NAME=FLAGS" >&2 && exit 2; } && variants+=("$2") && shift 2 ;;
    *) echo "unknown argument: $1" >&2 && exit 2 ;;
  esac
done

rm -rf .gpu/lib
mkdir -p .gpu/lib .gpu/wheels
"$python" -m vim.build --cuda "$architecture" --into .gpu/lib/base

for variant in ${variants[@]+"${variants[@]}"}; do
  name=${variant%%=*}
  cp -r .gpu/lib/base ".gpu/lib/$name"
  # Built in a cache of its own: the flags are not part of a library's key. nvcc itself reads NVCC_APPEND_FLAGS.
  cache=$(mktemp -d)
  VIM_CACHE_DIR=$cache NVCC_APPEND_FLAGS=${variant#*=} "$python" - "$architecture" ".gpu/lib/$name" <<'PY'
import sys
from pathlib import Path

from vim.ops.build import compilation, cuda_recipe

recipe = cuda_recipe.recipe([cuda_recipe.parse_architecture(sys.argv[1])])
print(compilation.keep_prebuilt(compilation.build(recipe, print), recipe, Path(sys.argv[2])))
PY
  rm -rf "$cache"
done

if ! compgen -G ".gpu/wheels/timm-*.whl" >/dev/null; then
  timm=$("$python" -c 'import importlib.metadata as m; print(m.version("timm"))')
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels "timm==$timm"
fi
du -sh .gpu/lib .gpu/wheels
