#!/usr/bin/env bash
# What happens on a worker, in the commit that was shipped to it; called by the scripts beside it.
#   setup tpu|gpu|cpu [COMMAND]    COMMAND first (mounts a bucket, say); then .venv with requirements.lock's versions
#   exec tpu|gpu|cpu PKV...        the pkv command, in this process
#   run COMMIT WHERE tpu PKV...    the same in the background, log and exit code in ~/pkv-job; WHERE, unless it is -,
#                                  must be a mount: what is written there outlives this machine
#   resume COMMIT WHERE tpu PKV... the same, unless it runs
#   status [RUN] · stop · logs LINES [--follow]
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
# shellcheck source=launch/env.sh
source launch/env.sh

job=$HOME/pkv-job # pid, exit, log; `stopped` when somebody asked for the end

must_know() {
    [[ $1 == tpu || $1 == gpu || $1 == cpu ]] || stop "accelerator: got '$1', expected tpu, gpu or cpu"
}

# Ubuntu 22.04, which TPU machines run, brings Python 3.10.
find_or_install_python() {
    if (find_python) >/dev/null 2>&1 || ! command -v apt-get >/dev/null; then return; fi
    echo "Installing Python 3.11"
    sudo apt-get update -qq && sudo apt-get install -qq --yes python3.11 python3.11-venv
}

setup() {
    must_know "$1"
    if [[ -n ${2-} ]]; then bash -c "$2" || stop "--prepare: the command failed on $(hostname): $2"; fi
    if [[ -f requirements.lock ]]; then
        export PIP_CONSTRAINT=$PWD/requirements.lock
    else
        echo "NOTICE: no requirements.lock in this commit; installed are the newest versions that pyproject.toml allows"
    fi
    find_or_install_python
    case $1 in
    tpu)
        make_environment .venv report,tpu
        # Without huge pages libtpu starts and ends slowly on v5e and later, and JAX warns.
        sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null ||
            echo "NOTICE: huge pages stay as they are on $(hostname)"
        ;;
    gpu) make_environment .venv report && install_into .venv "jax[cuda12]" ;;
    cpu) make_environment .venv report ;;
    esac
    echo "ready: $(hostname), commit $(git rev-parse HEAD 2>/dev/null || echo "${PKV_COMMIT-unknown}")"
}

execute() {
    must_know "$1"
    environment_of "$1"
    export PYTHONUNBUFFERED=1
    exec .venv/bin/pkv "${@:2}"
}

running() {
    [[ -s $job/pid ]] && grep -qsE 'pkv|worker.sh' "/proc/$(<"$job/pid")/cmdline"
}

start() {
    local wanted=$1 where=$2
    [[ $(git rev-parse HEAD) == "$wanted" ]] ||
        stop "$(hostname) has commit $(git rev-parse HEAD), expected $wanted: run setup first"
    if running && [[ $verb == resume ]]; then echo "runs already: $(hostname)" && return; fi
    if running; then stop "$(hostname): pkv already runs; stop it first"; fi
    if [[ $where != - ]] && ! mountpoint -q "$where"; then
        stop "$(hostname): $where is not a mount, so what is written there goes with this machine;" \
            "mount a bucket or a disk there by setup --prepare"
    fi
    mkdir -p "$job"
    rm -f "$job"/{pid,exit,stopped}
    setsid bash launch/worker.sh job "${@:3}" >"$job/log" 2>&1 </dev/null &
    # Where the disk is full neither file is written, and the process of `job` ends.
    until [[ -s $job/pid || -s $job/exit ]]; do
        kill -0 "$!" 2>/dev/null || [[ -s $job/pid || -s $job/exit ]] ||
            stop "$(hostname): $job/pid could not be written; is the disk full? See: df -h $job"
        sleep 0.1
    done
    echo "started: $(hostname)"
}

# The background process of `start`: pkv is its child, so that its exit code is known.
job() {
    local code=0
    bash launch/worker.sh exec "$@" &
    echo "$!" >"$job/pid" || { kill "$!" && exit 1; }
    wait "$!" || code=$?
    echo "$code" >"$job/exit"
}

# status [RUN]: with the last step that is saved in that directory.
status() {
    local state=none saved=''
    if running; then
        state=running
    elif [[ -e $job/stopped ]]; then
        state=stopped
    elif [[ -s $job/pid ]]; then
        state="exited $(cat "$job/exit" 2>/dev/null || echo 137)" # killed together with the one that writes it
    fi
    if [[ -n ${1-} ]]; then
        saved=$({ find "$1/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' || true; } | sort -n | tail -n 1)
    fi
    echo "job: $state, $(hostname), commit $(git rev-parse --short HEAD)${saved:+, saved $saved}"
}

# SIGTERM to pkv alone: it ends its step, saves it and leaves; those who score for it are its own to end. One that has
# failed already is marked too, so that nobody starts it again.
end_job() {
    if [[ -d $job ]]; then touch "$job/stopped"; fi
    if running; then kill -TERM "$(<"$job/pid")" || true; fi
    status
}

logs() {
    [[ -e $job/log ]] || stop "$(hostname): no log yet; nothing was run here"
    tail -n "$1" ${2:+"$2"} "$job/log"
}

verb=${1-}
case $verb in
setup) setup "${@:2}" ;;
exec) execute "${@:2}" ;;
run | resume) start "${@:2}" ;;
job) job "${@:2}" ;;
status) status "${@:2}" ;;
stop) end_job ;;
logs) logs "${@:2}" ;;
*) stop "$verb: expected setup, exec, run, resume, status, stop or logs" ;;
esac
