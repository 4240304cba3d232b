#!/usr/bin/env bash
# Compile the Triton kernels of all ops for sm_90 with several versions of Triton, without a GPU: by default PyTorch 2.11's
# and the newest of the index. Versions differ in what their compilers accept.
# Usage: scripts/check_triton_versions.sh [VERSION ...]      ("newest" is a version, too)
# TRITON_FOLDER keeps the versions, 0.6 to 1 GB each; without it they go into a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${TRITON_FOLDER:-$(mktemp -d)}
[[ -n ${TRITON_FOLDER:-} ]] || trap 'rm -rf "$folder"' EXIT
versions=("$@")
((${#versions[@]})) || versions=(3.6.0 newest)

failed=()
for version in "${versions[@]}"; do
  target=$folder/$version
  if [[ ! -d $target/triton ]]; then
    requirement=triton
    [[ $version == newest ]] || requirement=triton==$version
    "${PYTHON:-python3}" -m pip install --quiet --no-deps --no-compile --target "$target" "$requirement"
  fi
  echo "== triton $version"
  # Before the Triton that came with PyTorch; kernels are cached by version.
  PYTHONPATH=$target:$PWD TRITON_INTERPRET=0 TRITON_CACHE_DIR=$folder/kernels \
    "${PYTHON:-python3}" scripts/check_triton_compiles.py sm_90 --dtypes bfloat16 float32 || failed+=("$version")
done
if ((${#failed[@]})); then
  echo "does not compile with triton ${failed[*]}" >&2
  exit 1
fi
