#!/usr/bin/env bash
# Measure the CPU tables of the README: scripts/benchmark_cpu.sh [PREFIX, default benchmarks/results/cpu].
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=${1:-benchmarks/results/cpu}
run() { python -m vim.benchmark --threads 2 "$@"; }

run --models '[vim_tiny_patch16_224,deit_tiny_patch16_224]' --sizes '[224,512,1248]' \
    --dtypes '[float32,bfloat16]' --rounds 30 --seconds 25 --output "$prefix-tiny"
run --models '[vim_tiny_patch16_224,deit_tiny_patch16_224]' --batches '[8]' --sizes '[224]' \
    --dtypes '[float32,bfloat16]' --rounds 30 --seconds 20 --output "$prefix-tiny-batch8"
run --models '[vim_small_patch16_224,deit_small_patch16_224]' --sizes '[224,512]' \
    --dtypes '[float32,bfloat16]' --rounds 30 --seconds 20 --output "$prefix-small"
run --models '[vim_tiny_patch16_224,deit_tiny_patch16_224]' --batches '[8]' --sizes '[224]' --modes '[training]' \
    --rounds 15 --seconds 25 --output "$prefix-training-224"
run --models '[vim_tiny_patch16_224,deit_tiny_patch16_224]' --batches '[2]' --sizes '[512]' --modes '[training]' \
    --rounds 15 --seconds 25 --output "$prefix-training-512"
# Variants of Vim, and DeiT with frozen weights.
run --models '[vim_tiny_patch16_224,vim_tiny_patch16_224:modules,vim_tiny_patch16_224:reference,deit_tiny_patch16_224,deit_tiny_patch16_224:frozen]' \
    --sizes '[224]' --rounds 20 --seconds 30 --output "$prefix-variants"
