# shellcheck shell=bash
# The environment of every rank of a job. Sourced by common.sh; edit it once for your cluster, each line says why.

# ---- edit this block -------------------------------------------------------------------------------------------
# Modules that the ranks need, if your cluster has its software in modules:
# module load cuda

# The virtual environment with megalm in it. `megalm launch slurm` sets MEGALM_VENV to its own; with conda, or where a
# container brings Python, replace the three lines by what activates yours.
venv="${MEGALM_VENV:-.venv}"
[[ -f $venv/bin/activate ]] || { echo "error: no virtual environment in $venv; edit slurm/env.sh" >&2; exit 2; }
# shellcheck disable=SC1091
source "$venv/bin/activate"

# The interface for NCCL's bootstrap and gloo's messages. Without it the first one is taken, often a slow management
# network; a wrong name hangs or fails at start. `ip -brief address` lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# The InfiniBand or RoCE adapters, when NCCL takes the wrong ones (storage has some too). `ibdev2netdev` lists them.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5

# AWS EFA and HPE Slingshot come with plug-ins of their own instead of InfiniBand verbs:
# export FI_PROVIDER=efa
# export FI_PROVIDER=cxi

# What NCCL has chosen (transport, rings), once, at the top of each rank's log. INFO is worth its few lines while a
# cluster is new.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Caches of compiled kernels on the node's own disk: thousands of ranks that compile into one shared home stall it.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/megalm-$UID/triton}"
# ----------------------------------------------------------------------------------------------------------------

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" # no more threads than cores: eight ranks share a node
export PYTHONFAULTHANDLER=1                        # a crash in native code leaves a Python stack in the rank's log
export PYTHONUNBUFFERED=1                          # what a killed rank said last is in its log
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1           # a dead peer ends the step instead of hanging it
export CUDA_DEVICE_MAX_CONNECTIONS=32              # a waiting receive must not share a queue with a collective
