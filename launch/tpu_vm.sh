#!/usr/bin/env bash
# TPU slices (v4, v5e, v5p, v6e) by Cloud TPU's queued resources. TPU7x: tpu_gce.sh.
#   bash launch/tpu_vm.sh VERB NAME --zone ZONE [--project ID] [--dry-run] ...
#   create   --type v5litepod-32 [--spot] [--slices N] [--runtime VERSION]
#   setup    [--prepare COMMAND] [--allow-dirty]     the commit to every worker, and an environment from its lock
#   run      [--env NAME=VALUE]... -- train CONFIG --run /mnt/pkv/NAME ...       in the background, on every worker
#   logs     [--worker N, of several slices SLICE/N] [--lines N] [--follow]
#   status   of the slice and of pkv on each worker
#   stop     pkv saves its step and leaves; the slice stays
#   delete
#   babysit  what create, setup and run take, [--max-restarts N] [--every SECONDS]: does all three, makes a preempted
#            slice anew and runs the same command, which resumes; ends when pkv has, when two starts in a row end with
#            code 2 on every worker, or after N restarts (10) without a new checkpoint. Where nobody answers any more it
#            goes on asking. --run must be below /mnt/pkv, and --prepare must mount a bucket there: the slice's own
#            disks go with it.
# Checked against a fake gcloud and the help of gcloud 528, which has every option, --node=all with a command or a file
# among them; never yet with a real slice. Ubuntu 22.04's python3.11 package is taken where the image has no newer one.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/machines.sh
source launch/machines.sh

type='' runtime='' slices=1
shape_options="--type --runtime --slices"

check_shape() {
    case $verb in create | babysit) ;; *) return ;; esac
    if [[ $type == v7* || $type == tpu7x* ]]; then
        stop "--type $(quoted "$type"): Cloud TPU's API has no TPU7x; use launch/tpu_gce.sh"
    fi
    type=${type/#v5e-/v5litepod-}
    must_match --type "$type" '(v4|v5litepod|v5p|v6e)-[1-9][0-9]*' "a slice such as v5litepod-32, v5p-16 or v6e-8"
    must_match --slices "$slices" '[1-9][0-9]*' "a whole number"
    must_match --runtime "${runtime:=$(runtime_of "$type")}" '[a-z0-9][-.a-z0-9]*' \
        "a TPU software version such as v2-alpha-tpuv6e"
}

# queued VERB ARGUMENTS...
queued() {
    perform ${limit[@]+"${limit[@]}"} gcloud compute tpus queued-resources "$@" --zone="$zone" \
        ${project:+"--project=$project"} --quiet
}

create_machines() {
    local nodes=(--node-id="$name") tier=()
    if ((slices > 1)); then nodes=(--node-count="$slices" --node-prefix="$name"); fi
    if $spot; then tier=(--spot); fi
    queued create "$name" "${nodes[@]}" --accelerator-type="$type" --runtime-version="$runtime" ${tier[@]+"${tier[@]}"}
}

delete_machines() {
    queued delete "$name" --force
}

describe_machines() {
    queued describe "$name"
}

state_of_machines() {
    local answer
    if $dry_run; then queued describe "$name" --format='value(state.state)' && return; fi
    if answer=$(queued describe "$name" --format='value(state.state)' 2>&1); then
        tail -n 1 <<<"$answer"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NONE
    else
        printf '%s\n' "$answer" >&2
        return 1
    fi
}

on_workers() {
    local node=0
    case $1 in */*) node=${1%/*} ;; all) node=all ;; esac
    queued ssh "$name" --node="$node" --worker="${1#*/}" --command="$2" "${alive[@]/#/--ssh-flag=}"
}

copy_to_workers() {
    queued scp "$1" "$name:$2" --node=all --worker=all "${alive[@]/#/--scp-flag=}"
}

options "$@"
act
