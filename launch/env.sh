# Sourced by whatever starts pkv: the only place that sets variables of XLA, libtpu and JAX. What you have set stays.
# shellcheck shell=bash

# usual NAME VALUE: unless it is set, were it to nothing.
usual() {
    [[ -n ${!1+set} ]] || export "$1=$2"
}

# environment_of tpu|gpu|cpu: a machine that lacks its accelerator says so, where JAX would go on with the CPU.
environment_of() {
    case $1 in
    tpu) usual JAX_PLATFORMS tpu,cpu ;;
    gpu)
        usual JAX_PLATFORMS cuda,cpu
        # Of the GPU's memory, taken at once. JAX's 0.75 leaves a quarter unused; NCCL and cuDNN need some hundred MB.
        usual XLA_PYTHON_CLIENT_MEM_FRACTION 0.92
        # Under Slurm JAX takes one GPU a task, unless it is told: a task that is alone on its node has all.
        local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE-}} tasks=${SLURM_STEP_NUM_TASKS-}
        if [[ $tasks && $tasks == "${SLURM_STEP_NUM_NODES-}" && $gpus =~ ^[1-9][0-9]*$ ]]; then
            usual JAX_LOCAL_DEVICE_IDS "$(seq -s , 0 "$((gpus - 1))")"
        fi
        ;;
    cpu) usual JAX_PLATFORMS cpu ;;
    esac
}

# Not set here, and why:
#   JAX_COMPILATION_CACHE_DIR  pkv keeps compiled programs itself, in ~/.cache/pkv/compiled, where nobody else can write
#       (pkv/compiling.py). Of several hosts JAX lets the first one write only: where they share no disk, each other one
#       compiles again after a restart, unless you name a directory that all see and only you can write.
#   LIBTPU_INIT_ARGS, XLA_FLAGS  no flag has been measured with pkv yet, and what is compiled ahead for a slice is
#       compiled with the defaults: a flag for speed that costs memory would make its figures untrue.
#   TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_*  the machines bring them.
