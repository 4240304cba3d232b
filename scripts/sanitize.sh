#!/usr/bin/env bash
# Run the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer, without torch.
# scripts/kernel_driver.cpp calls every kernel with awkward shapes in buffers of exact size, on one thread and on three.
# scripts/pool_driver.cpp stresses the thread pool.
# Usage: scripts/sanitize.sh [--time | --cuda]
#   --time: measure optimised kernels instead
#   --cuda: run the tests of the CUDA kernels, emulated on the host, instead; needs torch
# CXX chooses the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
cxx=${CXX:-g++}

if [[ ${1:-} == --cuda ]]; then
  # Python is not built for sanitizers, so their libraries must be preloaded. Leaks in Python are ignored.
  export LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
  export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
  export VIM_EMULATED_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
  # -s, or pytest keeps to itself what a sanitizer says before it ends the process.
  exec python -m pytest -q -s -n 0 tests/ops/test_conformance.py tests/ops/test_cuda_kernels.py \
    tests/ops/test_bidirectional_block.py -k "(emulated or cuda_kernels) and not registration" "${@:2}"
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

case $(uname -m) in
x86_64) sets="baseline avx2 avx512 avx512bf16" ;;
*) sets="baseline" ;;
esac

flags_of() {
  case $1 in
  avx2) echo -mavx2 -mfma -mf16c ;;
  avx512*)
    echo -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512
    [[ $1 != avx512bf16 ]] || echo -mavx512bf16
    ;;
  esac
}

# build NAME FLAGS...: build the driver with all instruction sets as $folder/NAME
build() {
  local name=$1 set objects=()
  shift
  for set in $sets; do
    # shellcheck disable=SC2046
    "$cxx" -std=c++17 -Wno-psabi -Wno-maybe-uninitialized -fno-math-errno -ffp-contract=fast "$@" $(flags_of "$set") \
      "-DVIM_ISA=$set" -c csrc/cpu/kernels.cpp -o "$folder/$set.o"
    objects+=("$folder/$set.o")
  done
  "$cxx" -std=c++17 "$@" csrc/cpu/dispatch.cpp scripts/kernel_driver.cpp "${objects[@]}" -o "$folder/$name" -pthread
}

if [[ ${1:-} == --time ]]; then
  build time -O3
  for set in $sets; do VIM_CPU_CAPABILITY=$set "$folder/time" time; done
  exit
fi

for sanitizers in address,undefined thread; do
  flags=(-O1 -g "-fsanitize=$sanitizers" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  "$cxx" -std=c++17 "${flags[@]}" csrc/cpu/pool.cpp csrc/cpu/processors.cpp scripts/pool_driver.cpp \
    -o "$folder/pool" -pthread
  printf '%s: ' "$sanitizers"
  TSAN_OPTIONS=halt_on_error=1 "$folder/pool"
  build driver "${flags[@]}"
  for set in $sets; do
    printf '%s: ' "$sanitizers"
    # detect_stack_use_after_return needs GCC's fake stack, which does not align 64-byte vectors (GCC bug 110027).
    VIM_CPU_CAPABILITY=$set ASAN_OPTIONS=detect_stack_use_after_return=0 TSAN_OPTIONS=halt_on_error=1 "$folder/driver"
  done
done
echo clean
