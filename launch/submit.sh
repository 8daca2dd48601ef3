#!/usr/bin/env bash
# A pkv command as a job of a scheduler, at the commit that is checked out here.
#   bash launch/submit.sh WHERE NAME [options] [--env NAME=VALUE]... [--dry-run] [--allow-dirty] -- train CONFIG --run
#   slurm  [--nodes N] [--gpus N, of a node] [--cpus N, of a node: 4 a GPU] [--partition P] [--account A]
#          [--time D-HH:MM:SS] [--grace SECONDS, before that time's end]                              by slurm.sbatch
#          --run as a whole path, which all nodes see; the code runs from a copy of the commit in build/, where what
#          the job says lies too, in NAME-JOB.log
#   gke    --accelerator tpu-v6e-slice --topology 4x4 --claim VOLUME [--slices N] [--chips N, of a machine] [--image I]
#          [--spot] [--max-restarts N] [--grace SECONDS, from a pod's SIGTERM to its end]             by gke_jobset.yaml
#          --run below /mnt/pkv, where the claim is mounted; JobSet 0.10 or newer. Of a v5e or v6e 2x4 the default of 4
#          chips makes two pods, --chips 8 the one machine that pkv plan assumes
#   sky    --accelerator tpu-v6e-8 --bucket BUCKET [--runtime VERSION] [--spot: a managed job that recovers]
#          --run below /mnt/pkv, where the bucket is mounted                                            by skypilot.yaml
# --grace, 600 unless given, must exceed a step and its checkpoint, with which pkv leaves.
# Checked against fakes of sbatch, kubectl and sky only.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/shipping.sh
source launch/shipping.sh

nodes=1 gpus=8 cpus='' partition='' account='' time=''
accelerator='' topology='' claim='' slices=1 chips=4 image=python:3.12 max_restarts=10 bucket='' runtime='' spot=false
# More than qwen2.5-14b's steps are planned to take; for a scale-down GKE waits no longer.
grace=600
whole='[1-9][0-9]*'
word='[A-Za-z0-9][-_.A-Za-z0-9]*'

options() {
    local known flags=''
    where=${1-}
    case $where in
    slurm) known="--nodes --gpus --cpus --partition --account --time --grace" ;;
    gke) known="--accelerator --topology --claim --slices --chips --image --max-restarts --grace" flags=--spot ;;
    sky) known="--accelerator --bucket --runtime" flags=--spot ;;
    '' | help | -h | --help) usage && exit 0 ;;
    *) stop "$where: no such scheduler; expected slurm, gke or sky" ;;
    esac
    name=${2-}
    must_be_name "$where NAME" "$name"
    shift 2
    read_options " of $where" "--env $known" "$flags" "$@"
    must_be_given "$where" "${#arguments[@]}"
    check_environment
    must_match --grace "$grace" '[1-9][0-9]{0,3}|[1-5][0-9]{4}' "seconds below 60000, more than a step and its checkpoint take"
}

# seconds_of TIME: of D-HH:MM:SS, HH:MM:SS or minutes.
seconds_of() {
    local days=0 hours minutes seconds
    if [[ $1 == *-* ]]; then days=${1%-*}; fi
    IFS=: read -r hours minutes seconds <<<"${1#*-}"
    if [[ -z $minutes ]]; then minutes=$hours hours=0 seconds=0; fi
    echo "$((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))"
}

# filled TEMPLATE KEY VALUE...: the file with every @KEY@ replaced, without its comment.
filled() {
    local text
    text=$(grep -v '^#' "$1")
    shift
    while (($#)); do
        text=${text//"@$1@"/"$2"}
        shift 2
    done
    printf '%s\n' "$text"
}

# yaml_strings WORDS...: as YAML reads strings, on one line, with commas between them.
yaml_strings() {
    local one code list=''
    for one in "$@"; do
        one=${one//\\/\\\\}
        one=${one//\"/\\\"}
        while [[ $one =~ [[:cntrl:]] ]]; do
            printf -v code '\\u%04x' "'${BASH_REMATCH[0]}"
            one=${one//"${BASH_REMATCH[0]}"/"$code"}
        done
        list+=", \"$one\""
    done
    printf '%s\n' "${list#, }"
}

# with_environment COMMAND...: performed with what --env gives, so that no other command line shows it.
with_environment() {
    perform ${environment[@]+env "${environment[@]}"} "$@"
}

# secret: what --env gives, for pods.
secret() {
    local pair
    printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: "%s-env"}\nstringData:\n' "$name"
    for pair in "${environment[@]}"; do
        printf '  "%s": %s\n' "${pair%%=*}" "$(yaml_strings "${pair#*=}")"
    done
}

# written FILE: what stands on stdin into build/, or with --dry-run to stdout, indented.
written() {
    if $dry_run; then
        echo "# $1:" && sed 's/^/#   /'
    else
        mkdir -p build && cat >"$1"
    fi
}

on_slurm() {
    local limits=()
    must_match --nodes "$nodes" "$whole" "a whole number"
    must_match --gpus "$gpus" "$whole" "the GPUs of a node"
    must_match --cpus "${cpus:=$((4 * gpus))}" "$whole" "the CPUs of a node"
    must_match --partition "$partition" "($word)?" "a partition's name"
    must_match --account "$account" "($word)?" "an account's name"
    must_match --time "$time" '|([0-9]+-)?[0-9]+:[0-9]{2}:[0-9]{2}|[1-9][0-9]*' "D-HH:MM:SS, HH:MM:SS or minutes"
    if [[ -n $partition ]]; then limits+=(--partition="$partition"); fi
    if [[ -n $account ]]; then limits+=(--account="$account"); fi
    if [[ -n $time ]]; then
        (($(seconds_of "$time") > grace)) ||
            stop "--time $time: expected more than --grace, $grace s: so long before its end pkv is told to leave"
        limits+=(--time="$time")
    fi
    [[ $(run_folder "${arguments[@]}") == /* || ${arguments[0]} != train ]] ||
        stop "--run: expected a whole path that all nodes see, such as $PWD/runs/$name"
    must_go_on "${arguments[@]}" # a job is requeued
    pack
    with_environment sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" \
        --cpus-per-task="$cpus" --signal="INT@$grace" ${limits[@]+"${limits[@]}"} \
        launch/slurm.sbatch "$commit" "${arguments[@]}"
}

on_gke() {
    local total hosts code=pkv-${commit:0:12} archive=build/pkv-$commit.tar.gz file=build/$name.yaml selector from=''
    local dollar=\$\$ # Kubernetes makes one of two, and a variable's value of $(NAME)
    must_match --accelerator "$accelerator" 'tpu-(v4-podslice|v5-lite-podslice|v5p-slice|v6e-slice)|tpu7x' \
        "GKE's name of a TPU such as tpu-v6e-slice"
    must_match --topology "$topology" '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' "a topology such as 4x4 or 2x2x4"
    must_match --chips "$chips" '1|4|8' "1, 4 or 8 chips of a machine"
    must_match --slices "$slices" "$whole" "a whole number"
    must_match --max-restarts "$max_restarts" "0|$whole" "a whole number"
    must_be_name --claim "$claim"
    must_match --image "$image" '[A-Za-z0-9][-_.:/@A-Za-z0-9]*' "a container image with bash and Python 3.11 or newer"
    total=$((${topology//x/*})) hosts=$((total / chips))
    ((hosts * chips == total)) ||
        stop "--topology $topology: $total chips are no multiple of the $chips of a machine (--chips)"
    must_last /mnt/pkv "${arguments[@]}"
    if $spot; then selector='cloud.google.com/gke-spot: "true"'; else selector='# on demand'; fi
    if ((${#environment[@]})); then from="{secretRef: {name: \"$name-env\"}}"; fi
    local parts=(pkv configs launch pyproject.toml README.md LICENSE)
    if [[ -f requirements.lock ]]; then parts+=(requirements.lock); fi
    perform mkdir -p build
    # A ConfigMap holds 1 MiB; without tests and pictures the code is a quarter of that.
    perform git archive --format=tar.gz --output="$archive" HEAD "${parts[@]}"
    filled launch/gke_jobset.yaml NAME "$name" COMMIT "$commit" RESTARTS "$max_restarts" GRACE "$grace" \
        SLICES "$slices" HOSTS "$hosts" ACCELERATOR "$accelerator" TOPOLOGY "$topology" SPOT "$selector" \
        IMAGE "$image" CHIPS "$chips" CLAIM "$claim" CODE "$code" FROM "[$from]" \
        ARGUMENTS "[$(yaml_strings "${arguments[@]//\$/$dollar}")]" | written "$file"
    if $dry_run || ! kubectl get configmap "$code" >/dev/null 2>&1; then
        perform kubectl create configmap "$code" --from-file=pkv.tar.gz="$archive"
    fi
    if [[ -n $from ]]; then perform kubectl apply --filename=- <<<"$(secret)"; fi
    perform kubectl apply --filename="$file"
}

on_sky() {
    local kind=gpu file=build/$name.yaml pair secrets=()
    if [[ $accelerator == tpu-* ]]; then kind=tpu; fi
    must_match --accelerator "$accelerator" "tpu-(v4|v5litepod|v5p|v6e)-$whole|[A-Z][-A-Za-z0-9]*(:$whole)?" \
        "a TPU such as tpu-v6e-8 or GPUs such as H100:8"
    must_match --bucket "$bucket" '[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]' "a bucket's name, without gs://"
    if [[ $kind == tpu ]]; then
        must_match --runtime "${runtime:=$(runtime_of "${accelerator#tpu-}")}" '[a-z0-9][-.a-z0-9]*' \
            "a TPU software version such as v2-alpha-tpuv6e"
    fi
    must_last /mnt/pkv "${arguments[@]}"
    pack
    filled launch/skypilot.yaml NAME "$name" ACCELERATOR "$accelerator" RUNTIME "$runtime" SPOT "$spot" \
        BUNDLE "$(yaml_strings "$PWD/$bundle")" BUCKET "$bucket" COMMIT "$commit" KIND "$kind" \
        ARGUMENTS "$(quoted "${arguments[@]}")" |
        if [[ $kind == tpu ]]; then cat; else grep -v accelerator_args; fi | written "$file"
    for pair in ${environment[@]+"${environment[@]}"}; do secrets+=(--secret "${pair%%=*}"); done
    local how=(launch --cluster "$name")
    if $spot; then how=(jobs launch --name "$name"); fi
    with_environment sky "${how[@]}" --yes --detach-run ${secrets[@]+"${secrets[@]}"} "$file"
}

options "$@"
case $where in
slurm) must_have sbatch "Slurm's commands, or submit where they are" ;;
gke) must_have kubectl "Kubernetes' CLI" ;;
sky) must_have sky "SkyPilot" ;;
esac
pin_commit
"on_$where"
