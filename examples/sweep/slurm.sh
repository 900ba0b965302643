#!/usr/bin/env bash
# A Ray cluster for the length of a Slurm job: a head on the first node, the others join it.
# When the job ends before the sweep, submit it again: it goes on where it was.
#
#   sbatch slurm.sh
#SBATCH --job-name=tl-melbo-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}"
out=${OUT:-runs/sweep} # on a file system that all nodes share
venv=${VENV:-.venv} # with tl_melbo[cli,ray]
source "$venv/bin/activate"

# One cluster a job: its own port and token, so that nobody else's job joins it or is joined.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

start() { # node, the rest of `ray start`
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" ray start --block "$@" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats &
}

start "$head" --head --node-ip-address="$address" --port="$port" --include-dashboard=false
for attempt in {1..60}; do
    python - "$address" "$port" <<'PYTHON' && break
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()
except OSError:
    sys.exit(1)
PYTHON
    [ "$attempt" = 60 ] && { echo "Ray's head did not start" >&2; exit 1; }
    sleep 2
done
for node in "${nodes[@]:1}"; do
    start "$node" --address="$address:$port"
done

# The job's own script runs on the first node. Two workers share a GPU.
tl-melbo sweep sweep.yaml --out "$out" --engine ray --address "$address:$port" --gpus 0.5
