#!/usr/bin/env bash
# A study on a Cloud TPU slice, from its creation to its deletion; spot slices may be taken away
# and are made again.
#
#   tpu_scripts/tpu.sh [--dry-run] create | wait | setup | run | keep | fetch | delete
#
# --dry-run prints every command and runs none. Any variable below can be set in the environment.
# `keep` is all of create, wait, setup and run, again after every preemption, until the command is
# done: what was finished or saved under OUT is not done twice.
set -euo pipefail

NAME=${NAME:-lowrank}                          # of the queued resource and its node
PROJECT=${PROJECT:-my-project}                 # Google Cloud project
ZONE=${ZONE:-us-west4-a}                       # where there is quota for TYPE
TYPE=${TYPE:-v5litepod-8}                      # accelerator type; 8 chips of v5e
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}        # software version that fits TYPE
SPOT=${SPOT:-1}                                # 1: cheaper, may be taken away; 0: on demand
SHARE=${SHARE-10.0.0.2:/lowrank}               # NFS export that all workers see; empty: none
MIRROR=${MIRROR:-}                             # gs:// address for a copy of OUT; empty: none
disk=/tmp
if [ -n "$SHARE" ]; then disk=/mnt; fi
OUT=${OUT:-$disk/lowrank/$NAME/out}            # results and checkpoints, in SHARE
COMMAND=${COMMAND:-study configs/demo.py}      # of jax-lowrank; OUT is added
RESTARTS=${RESTARTS:-20}                       # how often `keep` makes the slice again
POLL=${POLL:-30}                               # seconds between two looks at the state
RESULTS=${RESULTS:-results/$NAME}              # where `fetch` puts them here

dry=
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi

go() { # run a command, or print it
    if [ -n "$dry" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

where=(--project "$PROJECT" --zone "$ZONE")

on_all() { # a command on every worker of the slice
    go gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

create() {
    local spot=()
    if [ "$SPOT" = 1 ]; then spot=(--spot); fi
    go gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${where[@]}" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" "${spot[@]}"
}

state() {
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
        --format 'value(state.state)' 2>/dev/null || echo NONE
}

wait_active() {
    if [ -n "$dry" ]; then
        go gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
            --format 'value(state.state)'
        return
    fi
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in FAILED | SUSPENDED | NONE)
            echo "$NAME is $(state), not on its way to ACTIVE" >&2 && return 1 ;;
        esac
        sleep "$POLL"
    done
}

setup() {
    go git archive --format tar.gz --output lowrank.tar.gz HEAD
    go gcloud compute tpus tpu-vm scp lowrank.tar.gz "$NAME:" "${where[@]}" --worker=all
    # The images' own Python is too old, some of them want no packages in it: uv finds or gets one.
    on_all "mkdir -p lowrank && tar xzf lowrank.tar.gz -C lowrank && cd lowrank \
&& PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv \
&& python3 -m uv venv -q --allow-existing --python '>=3.11,<3.14' \
&& python3 -m uv pip install -q -c constraints.txt -e .[tpu]${MIRROR:+ gcsfs}"
    if [ -n "$SHARE" ]; then
        on_all "sudo apt-get install -qqy nfs-common && sudo mkdir -p /mnt/lowrank \
&& { mountpoint -q /mnt/lowrank || sudo mount -t nfs $SHARE /mnt/lowrank; } \
&& sudo install -d -m 777 ${OUT%/*}"
    fi
}

run() {
    on_all "cd lowrank && .venv/bin/jax-lowrank $COMMAND --distributed --out $OUT\
${MIRROR:+ --mirror $MIRROR}"
}

keep() {
    local made
    for made in $(seq 0 "$RESTARTS"); do
        if { [ -z "$dry" ] && [ "$(state)" = ACTIVE ]; } ||
            { create && wait_active && setup; }; then
            if run; then return; fi
        fi
        echo "$NAME stopped ($made restarts so far)" >&2
        if [ -n "$dry" ] || [ "$(state)" != ACTIVE ]; then delete || true; else sleep "$POLL"; fi
    done
    echo "$NAME: given up after $RESTARTS restarts" >&2
    return 1
}

fetch() {
    if [ -n "$MIRROR" ]; then
        go mkdir -p "$RESULTS" && go gcloud storage rsync --recursive "$MIRROR" "$RESULTS"
        return
    fi
    go mkdir -p "$(dirname "$RESULTS")"
    go gcloud compute tpus tpu-vm scp --recurse "$NAME:$OUT" "$RESULTS" "${where[@]}" --worker=0
}

delete() {
    go gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

case "${1:-}" in
    create | setup | run | keep | fetch | delete) "$1" ;;
    wait) wait_active ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
