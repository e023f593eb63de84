#!/bin/bash
# What every rank of a job needs in its environment. Sourced by the batch scripts; edit it for your cluster.

# ---- edit this block -------------------------------------------------------------------------------------------
# module load cuda
# shellcheck disable=SC1091
source "${MEGALM_VENV:-.venv}/bin/activate"

# The network of the fabric, where NCCL does not find it by itself:
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# ----------------------------------------------------------------------------------------------------------------

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export PYTHONFAULTHANDLER=1                    # a crash leaves a stack in the rank's log
export PYTHONUNBUFFERED=1                      # what a killed rank said last is in its log
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1       # a dead peer ends the step instead of hanging it
export CUDA_DEVICE_MAX_CONNECTIONS=32          # a waiting receive must not share a queue with a collective
