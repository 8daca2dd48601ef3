#!/usr/bin/env bash
# Make the test environment and run the tests that take seconds; --all runs all of them. Other arguments go to pytest.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

all=false
arguments=()
for argument in "$@"; do
    if [[ $argument == --all ]]; then all=true; else arguments+=("$argument"); fi
done

folder=.venv-test
make_environment "$folder" test,report
# optional MODULE WHAT ARGUMENTS...: what some slow tests need beyond pkv; where it cannot be had they are left out.
optional() {
    local module=$1 what=$2
    shift 2
    if "$folder/bin/python" -c "import $module" >/dev/null 2>&1; then return; fi
    echo "Installing $* for $what"
    install_into "$folder" "$@" 2>/dev/null || echo "NOTICE: $* cannot be had here; not tested: $what"
}

if $all; then
    # Linux wheels without "+cpu" bring gigabytes of CUDA with them.
    torch=torch==2.13.0
    if [[ $(uname -s) == Linux ]]; then torch+=+cpu; fi
    optional torch "live parity with transformers" --only-binary torch "$torch"
    if "$folder/bin/python" -c 'import torch' >/dev/null 2>&1; then optional peft "adapters in PEFT" peft; fi
    optional libtpu "programs compiled for TPU" "jax[tpu]"
    set -- --durations=15
else
    set -- --durations=15 -m "not slow"
fi
# Two processes, a file's tests in one of them: compiling, most of the time, keeps hardly more than one core busy.
exec "$folder/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" ${arguments[@]+"${arguments[@]}"}
