#!/usr/bin/env bash
# Start a command of `distbench` under torchrun, on one node or on several. Without a command it is `distbench run`.
#
#   launch/torchrun.sh --model tiny
#   launch/torchrun.sh suite smoke --out results
#   MASTER_ADDR=node0 NNODES=2 NODE_RANK=0 launch/torchrun.sh     on node0; on the other node NODE_RANK=1
#
#   NPROC_PER_NODE  ranks on each node (one for each GPU that torch sees, else 8)
#   NNODES          nodes (1); with one, the ranks meet on a free port of this machine
#   NODE_RANK       this node, from 0; node 0 hosts the rendezvous. Needed with several nodes
#   MASTER_ADDR     name or address of node 0. Needed with several nodes
#   MASTER_PORT     port on node 0 (29500)
#   RDZV_ID         the same word on all nodes of a job (the Slurm, PBS or LSF job id, else distbench)
#   OMP_NUM_THREADS threads of a rank (cores / ranks, at least 1)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    interface of this node (with several nodes, the one towards node 0)
#   VENV            environment to start from (.venv of this checkout; the active one where that does not exist)
#
# torchrun numbers the ranks of several nodes itself: rank 0, which prints and writes the report, may be on any of them.
set -euo pipefail

fail() {
    echo "torchrun.sh: $*" >&2
    exit 2
}

# check_integer NAME LEAST MOST FIX: fail unless the variable NAME holds an integer in that range.
check_integer() {
    local value=${!1}
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $2 || value > $3)); then
        fail "$1=$value: allowed are integers from $2 to $3; $4"
    fi
}

count_ranks() {
    local gpus
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || fail "torch does not import; run: make setup"
    echo $((gpus > 0 ? gpus : 8))
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit
fi

PATH=${VENV:-$(cd "$(dirname "$0")/.." && pwd)/.venv}/bin:$PATH
command -v torchrun >/dev/null || fail "torchrun: not found; run: make setup"

NNODES=${NNODES:-1}
check_integer NNODES 1 65536 "set it to the number of nodes"
NPROC_PER_NODE=${NPROC_PER_NODE:-$(count_ranks)}
check_integer NPROC_PER_NODE 1 1024 "set it to the number of ranks on each node"

rendezvous=(--standalone)
if ((NNODES > 1)); then
    NODE_RANK=${NODE_RANK:-unset} MASTER_PORT=${MASTER_PORT:-29500}
    check_integer NODE_RANK 0 $((NNODES - 1)) "set it on each node to a number of its own"
    check_integer MASTER_PORT 1 65535 "set it to a free port of node 0"
    [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR=: needed with NNODES=$NNODES; set it to the address of node 0"
    if ((NODE_RANK == 0)); then
        python -c "import socket; socket.create_server(('', $MASTER_PORT)).close()" >/dev/null 2>&1 ||
            fail "MASTER_PORT=$MASTER_PORT: in use on this node; set it to a free port, the same on all nodes"
    fi
    host=${MASTER_ADDR#\[} endpoint=$MASTER_ADDR
    host=${host%\]}
    [[ $host != *:* ]] || endpoint=[$host]
    rendezvous=(
        --rdzv-backend=c10d
        --rdzv-endpoint="$endpoint:$MASTER_PORT"
        --rdzv-id="${RDZV_ID:-${SLURM_JOB_ID:-${PBS_JOBID:-${LSB_JOBID:-distbench}}}}"
        --rdzv-conf=is_host=$((NODE_RANK == 0))
    )
    interfaces=$(python -m distbench.launcher.nodes.interfaces "$host" "$MASTER_PORT")
    while IFS= read -r variable; do
        [[ -z $variable ]] || export "${variable?}"
    done <<<"$interfaces"
fi
[[ $# -gt 0 && $1 != -* ]] || set -- run "$@"

threads=$(($(nproc) / NPROC_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
echo "torchrun.sh: $NNODES x $NPROC_PER_NODE ranks, OMP_NUM_THREADS=$OMP_NUM_THREADS, ${rendezvous[*]}" >&2
exec torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" "${rendezvous[@]}" -m distbench "$@"
