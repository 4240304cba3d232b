#!/usr/bin/env bash
# Compile the CPU kernels for 64-bit ARM, and run their checks under emulation: scripts/check_arm.sh
# Needs Debian's g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

compile() { aarch64-linux-gnu-g++ -std=c++17 -O3 -Wno-psabi -fno-math-errno -ffp-contract=fast "$@"; }
compile -DVIM_ISA=baseline -c csrc/cpu/kernels.cpp -o "$folder/kernels.o"
compile csrc/cpu/dispatch.cpp scripts/kernel_driver.cpp "$folder/kernels.o" -static -pthread -o "$folder/driver"
qemu-aarch64 "$folder/driver"
compile csrc/cpu/pool.cpp csrc/cpu/processors.cpp scripts/pool_driver.cpp -static -pthread -o "$folder/pool"
qemu-aarch64 "$folder/pool"
