#!/usr/bin/env bash
# Make the test environment and run the tests that take seconds; --all runs all of them. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

all=false
arguments=()
for argument in "$@"; do
    if [[ $argument == --all ]]; then all=true; else arguments+=("$argument"); fi
done

folder=.venv-test
make_environment "$folder" test,report
if $all; then
    if ! "$folder/bin/python" -c 'import torch' >/dev/null 2>&1; then
        # Linux wheels without "+cpu" bring gigabytes of CUDA with them.
        torch=torch==2.13.0
        if [[ $(uname -s) == Linux ]]; then torch+=+cpu; fi
        echo "Installing $torch for live parity with transformers"
        if ! install_into "$folder" --only-binary torch "$torch" 2>/dev/null; then
            echo "NOTICE: $torch cannot be had here; parity is tested against the golden files only"
        fi
    fi
    set -- --durations=15
else
    set -- --durations=15 -m "not slow"
fi
exec "$folder/bin/python" -m pytest "$@" ${arguments[@]+"${arguments[@]}"}
