#!/usr/bin/env bash
# TPU7x slices by Compute Engine: one machine of four chips, or a managed group of them. Other TPUs: tpu_vm.sh.
#   bash launch/tpu_gce.sh VERB NAME --zone ZONE --project ID [--dry-run] ...
#   create   --topology 2x2x1 [--spot] [--image FAMILY] [--disk GB]
#   setup, run, logs, status, stop, delete, babysit    as in tpu_vm.sh, with --topology for --type
# Written from Google's documentation of workload policies and groups and from public recipes, checked against a fake
# gcloud, its options against the help of gcloud 528 (June 2025): there --target-size-policy-mode is of its alpha only,
# so that a group of several machines wants a newer one. A public recipe (July 2026) made two machines of v6e in a zonal
# group by these options. NOT verified, for want of such a machine: that TPU7x can be had on demand or spot in a group
# (Google's pages of TPUs say so; its page of bulk mode has reservations and flex-start alone); that the group's
# instances carry the metadata by which jax.distributed finds its peers. JAX reads agent-worker-number and
# worker-network-endpoints; a public recipe shows worker-id. Where the first is missing, several hosts need
# TPU_WORKER_HOSTNAMES and, each its own, TPU_WORKER_ID.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/machines.sh
source launch/machines.sh

topology='' image=ubuntu-accel-2404-amd64-tpu-tpu7x disk=200 hosts=0 found=''
shape_options="--topology --image --disk"

check_shape() {
    [[ $worker != */* ]] || stop "--worker: got $worker, expected a number or all, as there are no slices"
    [[ -n $project ]] || stop "--project: expected a project id; the placement policy is named by it"
    case $verb in create | delete | status | babysit) ;; *) return 0 ;; esac
    if [[ $verb == delete || $verb == status ]] && [[ -z $topology ]]; then return 0; fi
    must_match --topology "$topology" '[1-9][0-9]?x[1-9][0-9]?x[1-9][0-9]?' "chips in three directions, such as 2x2x1"
    local chips=$((${topology//x/*}))
    ((chips % 4 == 0 && chips <= 9216)) ||
        stop "--topology $topology: $chips chips; expected a multiple of the 4 of a machine, at most 9216"
    hosts=$((chips / 4))
    must_match --image "$image" '[a-z][-a-z0-9]*' "an image family of ubuntu-os-accelerator-images"
    must_match --disk "$disk" '[1-9][0-9]*' "gigabytes"
}

# compute GROUP... ARGUMENTS...
compute() {
    perform ${limit[@]+"${limit[@]}"} gcloud compute "$@" --project="$project" --quiet
}

# What a machine is, alone or as the group's template.
machine() {
    local tier=(--provisioning-model=STANDARD)
    if $spot; then tier=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
    printf '%s\n' --machine-type=tpu7x-standard-4t --maintenance-policy=TERMINATE "${tier[@]}" --image-family="$image" \
        --image-project=ubuntu-os-accelerator-images --boot-disk-type=hyperdisk-balanced --boot-disk-size="${disk}GB" \
        --no-shielded-secure-boot --scopes=cloud-platform --labels="pkv=$name"
}

# look_for KIND: into `found` the name of that part, or nothing where it isn't there; fails where that can't be learned.
look_for() {
    local where=''
    case $1 in
    resource-policies) where=" AND region:${zone%-*}" ;;
    instances | instance-groups*) where=" AND zone:$zone" ;;
    esac
    found=''
    # shellcheck disable=SC2086 # a kind may be two words
    $dry_run || found=$(compute $1 list --filter="name=$name$where" --format='value(name)')
}

# make KIND create ARGUMENTS...: unless it is there, from a creation that failed halfway.
make() {
    look_for "$1" || return
    if [[ -n $found ]]; then
        echo "NOTICE: $1 $name is there and stays as it is; if it should be another, delete $name first" >&2
    else
        # shellcheck disable=SC2086
        compute $1 "${@:2}"
    fi
}

# remove KIND ARGUMENTS...: if it is there.
remove() {
    look_for "$1" || return
    # shellcheck disable=SC2086
    if $dry_run || [[ -n $found ]]; then compute $1 delete "$name" "${@:2}" && any=true; fi
}

create_machines() {
    local region=${zone%-*} flags=() flag
    while IFS= read -r flag; do flags+=("$flag"); done < <(machine)
    if ((hosts == 1)); then
        make instances create "$name" --zone="$zone" "${flags[@]}"
        return
    fi
    make resource-policies create workload-policy "$name" --region="$region" --type=HIGH_THROUGHPUT \
        --accelerator-topology="$topology" &&
        make instance-templates create "$name" "${flags[@]}" &&
        make "instance-groups managed" create "$name" --zone="$zone" --template="$name" --size="$hosts" \
            --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
            --workload-policy="projects/$project/regions/$region/resourcePolicies/$name"
}

# A single machine, and each part of a group, whichever there are; the group goes before what it is made of.
delete_machines() {
    local any=false
    remove instances --zone="$zone" && remove "instance-groups managed" --zone="$zone" &&
        remove instance-templates && remove resource-policies --region="${zone%-*}" || return
    $any || echo "NOTICE: there is nothing named $name in $zone" >&2
}

# list FORMAT: one line a machine.
list() {
    compute instances list --filter="labels.pkv=$name" --zones="$zone" --format="value($1)"
}

describe_machines() {
    list name,status
}

state_of_machines() {
    local states
    states=$(list status) || return
    if $dry_run; then
        printf '%s\n' "$states"
    elif [[ -z $states ]]; then
        look_for "instance-groups managed" || return
        if [[ -n $found ]]; then echo PROVISIONING; else echo NONE; fi
    elif grep -qE 'STOP|TERMINATED|SUSPEND' <<<"$states"; then
        echo PREEMPTED
    elif [[ $(sort <<<"$states" | uniq -c | tr -s ' ') == " $hosts RUNNING" ]]; then
        echo ACTIVE
    elif (($(wc -l <<<"$states") < hosts)); then
        echo INCOMPLETE # being made, or one is lost
    else
        echo PROVISIONING
    fi
}

# workers WHICH: all names, or the one at that place in their order.
workers() {
    if $dry_run; then
        echo EACH_MACHINE && return
    fi
    local names
    names=$(list name | sort) && [[ -n $names ]] || stop "$name: no machines in $zone; create them first"
    if [[ $1 != all ]]; then
        names=$(sed -n "$(($1 + 1))p" <<<"$names") && [[ -n $names ]] || stop "--worker $1: $name has not so many"
    fi
    printf '%s\n' "$names"
}

# everywhere WHICH COMMAND...: at the same time on each, with MACHINE replaced by its name; fails where one does.
everywhere() {
    local machines one waiting=() failed=0
    machines=$(workers "$1") || return
    shift
    for one in $machines; do
        compute "${@/#MACHINE/$one}" --zone="$zone" &
        waiting+=("$!")
    done
    for one in ${waiting[@]+"${waiting[@]}"}; do wait "$one" || failed=1; done
    return "$failed"
}

on_workers() {
    everywhere "$1" ssh MACHINE --command="$2" "${alive[@]/#/--ssh-flag=}"
}

copy_to_workers() {
    everywhere all scp "$1" "MACHINE:$2" "${alive[@]/#/--scp-flag=}"
}

options "$@"
act
