#!/usr/bin/env bash
# A job on Kubernetes with JobSet and Kueue: `jobset` is one command on a TPU slice, `study` the
# runs of a study on GPUs.
#
#   tpu_scripts/gke/apply.sh [--dry-run] jobset | study | delete
#
# --dry-run prints the manifest and the command. Any variable can be set in the environment.
set -euo pipefail

NAME=${NAME:-lowrank}                              # of the JobSet
QUEUE=${QUEUE:-user-queue}                         # Kueue's LocalQueue
IMAGE=${IMAGE:-my-registry/jax-lowrank:latest}     # python, this package and its extra tpu or cuda
COMMAND=${COMMAND:-study configs/demo.py}          # of jax-lowrank
CLAIM=${CLAIM:-lowrank}                            # PersistentVolumeClaim, ReadWriteMany; at /out
OUT=${OUT:-/out/lowrank}                           # results and checkpoints, seen by all pods
HOSTS=${HOSTS:-2}                                  # hosts of the slice, or shards of the study
CHIPS=${CHIPS:-4}                                  # TPU chips of a host
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice}   # of the node pool
TOPOLOGY=${TOPOLOGY:-2x4}                          # of the node pool; HOSTS x CHIPS chips
RESTARTS=${RESTARTS:-20}                           # after preemptions and failures

dry=
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi

filled() { # a manifest with the values of the variables
    local text name
    text=$(<"$(dirname "$0")/$1.yaml")
    for name in NAME QUEUE IMAGE COMMAND CLAIM OUT HOSTS CHIPS ACCELERATOR TOPOLOGY RESTARTS; do
        text=${text//"\${$name}"/"${!name}"}
    done
    printf '%s\n' "$text"
}

case "${1:-}" in
    jobset | study)
        if [ -n "$dry" ]; then filled "$1" && echo "# kubectl apply --filename -" && exit; fi
        filled "$1" | kubectl apply --filename -
        ;;
    delete)
        if [ -n "$dry" ]; then echo "kubectl delete jobset $NAME" && exit; fi
        kubectl delete jobset "$NAME"
        ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
