# Sourced by tpu_vm.sh and tpu_gce.sh: what both do with rented machines. Not run by itself.
# Each of them gives: shape_options, check_shape, create_machines, delete_machines, describe_machines,
# state_of_machines (prints NONE, ACTIVE, INCOMPLETE, a name of waiting, or one that means gone),
# on_workers WORKER COMMAND and copy_to_workers FILE NAME.
# shellcheck shell=bash
# shellcheck source=launch/shipping.sh
source launch/shipping.sh

common_options="--zone --project --prepare --env --worker --lines --max-restarts --every"
shape_options='' # what the script that sources this takes besides
verb='' name='' zone='' project='' prepare='' worker=0 lines=100 follow=false max_restarts=10 every=60
# shellcheck disable=SC2034
spot=false
trouble=0   # commands that failed one after another, while babysitting
patience=10 # so many end it
# A machine that vanishes while something is done on it is seen within a minute.
# shellcheck disable=SC2034
alive=(-oConnectTimeout=30 -oServerAliveInterval=15)
limit=()            # what gcloud is called by
trap 'exit 130' INT # `timeout` keeps Ctrl-C from gcloud

# options ARGUMENTS...: VERB NAME [--option value]... [-- PKV COMMAND]
options() {
    verb=${1-}
    case $verb in
    create | setup | run | logs | status | stop | delete | babysit) ;;
    '' | help | -h | --help) usage && exit 0 ;;
    *) stop "$verb: no such verb; expected create, setup, run, logs, status, stop, delete or babysit" ;;
    esac
    name=${2-}
    must_be_name "$verb NAME" "$name"
    shift 2
    read_options '' "$shape_options $common_options" "--spot --follow" "$@"
    check
}

check() {
    local whole='0|[1-9][0-9]*'
    must_match --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]|[a-z]+-[a-z]+[0-9]+-ai[0-9]+[a-z]' "a zone such as us-east5-b"
    [[ -z $project ]] ||
        must_match --project "$project" '([a-z][-.a-z0-9]*:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' "a project id"
    must_match --worker "$worker" "(($whole)/)?(all|$whole)" "a number or all, of several slices as in 1/0"
    must_match --lines "$lines" "$whole" "a whole number"
    must_match --max-restarts "$max_restarts" "$whole" "a whole number"
    must_match --every "$every" '[1-9][0-9]*' "seconds, at least 1"
    check_environment
    check_shape
    if [[ $verb == run || $verb == babysit ]]; then must_be_given "$verb" "${#arguments[@]}"; fi
    if [[ $verb == babysit ]]; then
        must_last /mnt/pkv "${arguments[@]}"
        [[ -n $prepare ]] || stop "--prepare: expected a command that mounts a bucket or a disk at /mnt/pkv, as a" \
            "machine that is made anew has none there; --prepare true, where a startup script of yours mounts it"
    fi
    must_have gcloud "Google Cloud's CLI: cloud.google.com/sdk"
    case $verb in setup | run) pin_commit ;; babysit) pin_commit && pack ;; esac
}

# The verbs whose commands are the same for both.
setup() {
    local unpack="git init --quiet pkv && git -C pkv fetch --quiet ../pkv.bundle HEAD"
    unpack+=" && git -C pkv checkout --quiet --force --detach $commit"
    pack && copy_to_workers "$bundle" pkv.bundle &&
        on_workers all "$unpack && $(quoted bash pkv/launch/worker.sh setup tpu "$prepare")"
}

# run [resume]: what is written below /mnt/pkv is meant to last, so a mount must be there.
run() {
    local where=- words=(env ${environment[@]+"${environment[@]}"} bash pkv/launch/worker.sh "${1:-run}" "$commit")
    if [[ $(run_folder "${arguments[@]}") == /mnt/pkv/* ]]; then where=/mnt/pkv; fi
    on_workers all "$(quoted "${words[@]}" "$where" tpu "${arguments[@]}")"
}

logs() {
    local command="bash pkv/launch/worker.sh logs $lines"
    if $follow; then command+=" --follow"; fi
    on_workers "$worker" "$command"
}

# soon COMMAND...: a question; gcloud is ended after three minutes, where there is `timeout` (not on macOS).
soon() {
    local limit=()
    # shellcheck disable=SC2034
    if command -v timeout >/dev/null; then limit=(timeout --kill-after=10 180); fi
    "$@" </dev/null
}

# ask_jobs [RUN]
ask_jobs() {
    on_workers all "$(quoted bash pkv/launch/worker.sh status "$@") 2>/dev/null || echo \"job: none, \$(hostname)\""
}

status() {
    soon describe_machines && soon ask_jobs
}

stop_job() {
    on_workers all 'bash pkv/launch/worker.sh stop'
    echo "NOTICE: pkv saves its step and leaves; the machines stay, and cost, until they are deleted" >&2
}

say() {
    printf '%s %s: %s\n' "$(date -u +%H:%M:%S)" "$name" "$*"
}

# survive WHAT COMMAND...: run it; `patience` failures one after another end the babysitting.
survive() {
    if "${@:2}"; then
        trouble=0
    elif ((++trouble >= patience)); then
        give_up "$1 failed $trouble times; given up"
    else
        say "$1 failed; tried again in $every s"
    fi
}

recreate() {
    heard=false
    delete_machines && create_machines
}

# On workers where pkv runs already it goes on.
begin() {
    setup && run resume && fresh=true
}

# Look every so many seconds; what was preempted is made anew, and the same pkv command resumes from its checkpoint.
babysit() {
    local state jobs seen last='' looks=0 restarts=0 fresh=true mistakes=0 heard=false run saved reached=0
    run=$(run_folder "${arguments[@]}")
    if $dry_run; then babysit_in_words && return; fi
    while true; do
        state=$(soon state_of_machines) || state=UNKNOWN
        jobs=
        if [[ $state == ACTIVE ]]; then jobs=$(soon ask_jobs "$run") || jobs=; fi
        seen="$state$({ grep -o 'job: [a-z]*[ 0-9]*' || true; } <<<"$jobs" | sort | uniq -c | tr -s ' \n' ' ')"
        if [[ $seen != "$last" ]]; then looks=0 last=$seen; fi
        say "$seen" && ((++looks))
        saved=$({ grep -o 'saved [0-9]*' || echo saved 0; } <<<"$jobs" | cut -d ' ' -f 2 | sort -n | tail -n 1)
        if ((saved > reached)); then restarts=0 reached=$saved; fi
        case $state/$jobs in
        NONE/*) survive create create_machines ;;
        SUSPENDED/* | PREEMPTED/* | TERMINATED/* | FAILED/*)
            count_restart "machines $state"
            survive "delete and create" recreate
            ;;
        INCOMPLETE/*) # a group is made in one piece: what is missing so long won't come
            if ((looks >= patience)); then
                count_restart "machines missing"
                survive "delete and create" recreate
            fi
            ;;
        ACTIVE/*"job: running"*)
            trouble=0
            if ((looks >= patience)); then mistakes=0; fi
            # The start of one was lost, and the others wait for it.
            if [[ $jobs == *"job: none"* ]] && ((looks >= 3)); then again "pkv runs on some workers only"; fi
            ;;
        ACTIVE/*"job: stopped"*) say "stopped by hand; not started again" && return ;;
        ACTIVE/*"job: exited "[1-9]*)
            # A host that is being preempted ends the others before it is known to be: look a second time.
            if ((looks > 1)); then
                count_mistake "$jobs"
                again "pkv failed"
            fi
            ;;
        ACTIVE/*"job: none"*) survive "setup and run" begin ;;
        ACTIVE/*"job: exited 0"*) say "done; the machines stay, and cost, until they are deleted" && return ;;
        ACTIVE/* | UNKNOWN/*)
            # Who was heard before is out of reach for a while, such as from a laptop; to leave would save nothing.
            if $heard; then say "no answer; asked again in $every s"; else survive "asking" false; fi
            ;;
        esac
        if [[ $jobs == *"job: "* ]]; then heard=true; fi
        sleep "$every"
    done
}

# again WHY: start pkv where it doesn't run.
again() {
    count_restart "$1"
    survive run begin
}

# count_mistake JOBS: 2 on every worker is the user's mistake, or a fault that passes, such as a hub out of reach: it is
# over when the next start ends so too. A start is `fresh` until its end is counted; one that runs for `patience` looks
# had no mistake in it.
count_mistake() {
    if [[ ${1//job: exited 2,/} == *"job: "* ]]; then
        mistakes=0
    elif $fresh && ((++mistakes == 2)); then
        give_up "pkv exited with 2 on every worker, and did so again: a mistake in the command or config, see logs"
    fi
    fresh=false
}

# count_restart WHY: one more, or the end; `restarts` is babysit's, 0 again with each new checkpoint.
count_restart() {
    ((restarts < max_restarts)) ||
        give_up "$1, after $restarts restarts without a new checkpoint; --max-restarts $max_restarts reached"
    say "$1; restart $((++restarts)) of at most $max_restarts without a new checkpoint"
    last=
}

give_up() {
    say "$1; the machines that there are stay, and cost, until they are deleted" >&2
    exit 1
}

babysit_in_words() {
    echo "# every $every s:" && soon state_of_machines && soon ask_jobs "$run"
    echo "# where nothing is there:" && create_machines
    echo "# where nothing was started yet:" && begin
    echo "# after a preemption, at most $max_restarts times without a new checkpoint:"
    delete_machines && create_machines
}

# act: the verb that was asked for.
act() {
    case $verb in
    create) create_machines ;;
    delete) delete_machines ;;
    stop) stop_job ;;
    *) "$verb" ;;
    esac
}
