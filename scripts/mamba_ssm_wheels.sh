#!/usr/bin/env bash
# Build wheels of causal-conv1d and mamba-ssm for the installed Python and torch, for comparisons (docs/kernels.md).
# Their own set-up compiles for every generation of GPUs, which takes most of an hour; this script compiles for one.
# Usage: scripts/mamba_ssm_wheels.sh FOLDER [ARCHITECTURE]     (90, the default, is sm_90)
# FOLDER receives the wheels. If it already holds the source distributions, no network is needed.
# CUDA_HOME chooses the toolkit, MAX_JOBS the number of parallel compilers.
set -euo pipefail
folder=$(realpath -m "${1:?name a folder for the wheels}")
architecture=${2:-90}
python=${PYTHON:-python3}

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
command -v "$nvcc" >/dev/null || { echo "no nvcc: install the CUDA toolkit or set CUDA_HOME" >&2 && exit 2; }
# The nvcc on the path may be a link or a wrapper: ask nvcc itself for its folder.
toolkit=$(realpath "$("$nvcc" --dryrun -c x.cu 2>&1 | sed -n 's/^#\$ _HERE_=//p')/..")

# Wrap the toolkit: nvcc drops the other generations, and the compilers use C++20, which torch's headers need from 2.12 on
# and the packages' set-up does not request.
shim=$(mktemp -d)
trap 'rm -rf "$shim"' EXIT
mkdir "$shim/bin"
for path in "$toolkit"/*; do [[ ${path##*/} == bin ]] || ln -s "$path" "$shim/"; done
for path in "$toolkit"/bin/*; do [[ ${path##*/} == nvcc ]] || ln -s "$path" "$shim/bin/"; done
cat >"$shim/bin/nvcc" <<WRAPPER
#!/usr/bin/env bash
kept=()
while ((\$#)); do
  case \$1 in
  -gencode) shift ;;
  -gencode=*) ;;
  -std=c++17) kept+=(-std=c++20) ;;
  *) kept+=("\$1") ;;
  esac
  shift
done
# A call without sources only asks for the version.
[[ " \${kept[*]} " == *.cu* ]] && kept+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
exec "$toolkit/bin/nvcc" "\${kept[@]}"
WRAPPER
cat >"$shim/bin/c++" <<WRAPPER
#!/usr/bin/env bash
exec ${CXX:-c++} "\${@/-std=c++17/-std=c++20}"
WRAPPER
chmod +x "$shim/bin/nvcc" "$shim/bin/c++"

mkdir -p "$folder"
export CUDA_HOME=$shim CXX=$shim/bin/c++ CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
for package in causal-conv1d mamba-ssm; do
  source=$(find "$folder" -maxdepth 1 -name "${package//-/_}-*.tar.gz" | sort | tail -1)
  if [[ -z $source ]]; then
    # Downloading a source distribution runs its set-up, which does not need a compiler here.
    CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
      "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d "$folder" "$package"
    source=$(find "$folder" -maxdepth 1 -name "${package//-/_}-*.tar.gz" | sort | tail -1)
  fi
  echo "compiling $(basename "$source") for sm_$architecture"
  "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$folder" "$source"
done
ls "$folder"/*.whl
