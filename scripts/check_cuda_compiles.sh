#!/usr/bin/env bash
# Compile every CUDA kernel for sm_80 and sm_90 without a GPU, and check the compiler's report and the disassembly.
# Fast kernels must not spill registers or use local memory, and the main loops of the fast scan must stay within their
# instruction counts (docs/kernel_figures.md).
# Usage: scripts/check_cuda_compiles.sh [--fast]     (--fast: only the kernels with instruction counts, for sm_90)
# CUDA_HOME chooses the toolkit. PYTHON chooses a Python with triton, for the disassembler in its wheel; it is used if
# the toolkit has none.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
if ! command -v "$nvcc" >/dev/null; then
  echo "no nvcc: install the CUDA toolkit or set CUDA_HOME; nothing was checked" >&2
  exit 2
fi
# The nvcc on the path may be a link or a wrapper: ask nvcc itself for its folder.
bin=$("$nvcc" --dryrun -c x.cu 2>&1 | sed -n 's/^#\$ _HERE_=//p')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cuobjdump=$bin/cuobjdump
if [[ ! -x $cuobjdump ]]; then
  cuobjdump=$("${PYTHON:-python3}" -c 'import pathlib, triton
print(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")' 2>/dev/null || true)
fi

architectures="80 90" sources=(csrc/cuda/*.cu scripts/fast_*.cu)
if [[ ${1:-} == --fast ]]; then
  architectures=90 sources=(scripts/fast_*.cu)
fi

failures=0
fail() {
  echo "WRONG $*"
  failures=$((failures + 1))
}

# compile SOURCE ARCHITECTURE: write a cubin and the compiler's report
compile() {
  local name
  name=$folder/$(basename "$1" .cu).$2
  "$bin/nvcc" -std=c++17 -O3 "-gencode=arch=compute_$2,code=sm_$2" -Icsrc/cuda -Xptxas -v -cubin "$1" -o "$name.cubin" 2>"$name.log" ||
    { cat "$name.log" >&2 && return 1; }
}
export -f compile
export bin folder
for architecture in $architectures; do printf '%s\n' "${sources[@]/%/ $architecture}"; done |
  xargs -P "${JOBS:-2}" -L 1 bash -c 'compile "$@"' _

# in_memory LOG BYTES: print the kernels that use more local memory: spilled registers, or arrays with computed indices
in_memory() {
  awk -v most="$2" '/Function properties for/ { kernel = $NF }
       /bytes stack frame/ && ($1 > most || $5 > most || $9 > most) { print kernel ": " $1 " bytes of stack, " $5 " and " $9 " of spill stores and loads" }' "$1" |
    if command -v c++filt >/dev/null; then c++filt; else cat; fi | sed 's/vim::cuda:://g; s/^void //'
}

# most_barriers LOG: print the largest number of barriers that a kernel reserves; 16 of them leave four blocks for a
# multiprocessor
most_barriers() { sed -n 's/.*used \([0-9]*\) barriers.*/\1/p' "$1" | sort -n | tail -1; }

for log in "$folder"/*.log; do
  name=$(basename "$log" .log)
  barriers=$(most_barriers "$log")
  if ((${barriers:-0} > 3)); then fail "$name: a kernel reserves $barriers barriers"; fi
  registers=$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' "$log" | sort -n | tail -1)
  case $name in
    generic_*) kernels= ;; # need not be fast
    # More blocks a multiprocessor are worth a few numbers in local memory outside of the main loops.
    scan_forward_*.* | scan_backward_*.* | fast_*) kernels=$(in_memory "$log" 320) ;;
    *) kernels=$(in_memory "$log" 0) ;;
  esac
  if [[ -n $kernels ]]; then fail "$name: $kernels"; else echo "ok $name: at most ${registers:-0} registers"; fi
done

# within KEY LIMIT LINE: succeed if a count of the line stays within its limit
within() {
  awk -v value="$(sed -n "s/.* $1=\([0-9.]*\).*/\1/p" <<<"$3 ")" -v limit="$2" 'BEGIN { exit !(value != "" && value <= limit) }'
}

if [[ ! -x $cuobjdump ]]; then
  echo "no disassembler: install triton, or the toolkit's cuobjdump, to check the main loops" >&2
  exit 2
fi
for kernels in "$folder"/fast_*.90.cubin; do "$cuobjdump" -sass "$kernels"; done >"$folder/sass"
# count NAME FUNCTION STEPS LIMITS...: compare the counts of main loops, per channel-step, with the most that there may be
count() {
  local name=$1 line limit key most
  line=$("${PYTHON:-python3}" scripts/sass_counts.py "$folder/sass" "$2" --steps "$3")
  [[ $line == *" loops="[1-9]* ]] || fail "$name: no main loops"
  for limit in "${@:4}"; do
    read -r key most <<<"$limit"
    if within "$key" "$most" "$line"; then echo "ok $name, per channel-step: $key within $most"; else fail "$name: $key above $most"; fi
  done
  echo "$line"
}
# Two channels per thread, four tokens per pass.
count "forward, dt_rank 12" scan_forward_kernelINS0_8bfloat16ELi2ELi12E 8 "all 121" "MUFU 18" "LDS.128 6" "local 0"
count "forward, dt_rank 24" scan_forward_kernelINS0_8bfloat16ELi2ELi24E 8 "all 135" "MUFU 18" "LDS.128 7" "local 0.3"
# dt_proj is outside of the main loops here: once a tile, by tensor cores.
count "forward, dt_rank 48" scan_forward_kernelINS0_8bfloat16ELi2ELi48E 8 "all 110" "MUFU 18" "LDS.128 4" "local 0"
# Two loops one after the other, of eight tokens, two channels and a quarter of the states: twice the counts are a
# channel-step's.
count "backward, dt_rank 12, half" scan_backward_kernelINS0_8bfloat16ELi12E 4 "all 240" "MUFU 17" "local 0"
exit $((failures > 0))
