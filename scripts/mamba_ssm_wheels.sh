#!/usr/bin/env bash
# Wheels of causal-conv1d and mamba-ssm for the Python and the torch that run this, to measure beside (docs/kernels.md).
# Their own set-up compiles for every generation of GPUs, which takes the better part of an hour; this compiles for one.
# Usage: scripts/mamba_ssm_wheels.sh FOLDER [ARCHITECTURE]     (90, the default, is sm_90)
# FOLDER gets the wheels. Where it holds their source distributions already no network is needed; else they are fetched.
# CUDA_HOME chooses the toolkit; MAX_JOBS the compilers at a time.
set -euo pipefail
folder=$(realpath -m "${1:?name a folder for the wheels}")
architecture=${2:-90}
python=${PYTHON:-python3}

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
command -v "$nvcc" >/dev/null || { echo "no nvcc: install the CUDA toolkit or set CUDA_HOME" >&2 && exit 2; }
# What is on the path may be a link or a script: nvcc itself knows where it lies.
toolkit=$(realpath "$("$nvcc" --dryrun -c x.cu 2>&1 | sed -n 's/^#\$ _HERE_=//p')/..")

# A toolkit whose nvcc leaves the other generations out, and compilers that take the sources for C++20, as torch's headers
# from 2.12 on ask and their set-up does not.
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
# A call without sources asks for the version.
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
    # Asking a source distribution for its name runs its set-up, which need not look for a compiler.
    CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
      "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d "$folder" "$package"
    source=$(find "$folder" -maxdepth 1 -name "${package//-/_}-*.tar.gz" | sort | tail -1)
  fi
  echo "compiling $(basename "$source") for sm_$architecture"
  "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$folder" "$source"
done
ls "$folder"/*.whl
