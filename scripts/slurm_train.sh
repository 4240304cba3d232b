#!/usr/bin/env bash
# Train on several nodes under Slurm: sbatch scripts/slurm_train.sh RUN_FOLDER [options of vim.train]
# Two minutes before the time limit the run saves a checkpoint, and the job is queued again and resumes it.
# The run folder must be on a file system that all nodes share.
#SBATCH --job-name=vim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

folder=${1:?the folder of the run}
shift
if [ -f "$folder/config.yaml" ]; then
    arguments=(--resume "$folder")
else
    arguments=(--output "$folder" "$@")
fi
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first_node:29500" \
    -m vim.train "${arguments[@]}" &
run=$!
# srun forwards the signal to torchrun, and torchrun to the processes, which have 30 seconds to save.
trap 'stopped=yes; kill -TERM $run' TERM
stopped=no status=0
wait $run || status=$?
if [ "$stopped" = yes ]; then
    wait $run || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
