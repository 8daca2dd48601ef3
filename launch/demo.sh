#!/usr/bin/env bash
# From a bare machine with Python 3.11 or newer to a model that has learned to compete, in runs/tiny or `--run DIR`.
# All arguments go to `pkv train`.
set -euo pipefail
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

run=runs/tiny
arguments=()
while (($#)); do
    case $1 in
    --run) run=${2:?--run: expected a directory after it} && shift ;;
    --run=*) run=${1#--run=} ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
make_environment .venv report
echo "Training configs/tiny.yaml in $run (the same command goes on where it was stopped)"
.venv/bin/pkv train configs/tiny.yaml --run "$run" ${arguments[@]+"${arguments[@]}"}
echo "Writing the report"
.venv/bin/pkv report "$run"

cat <<TEXT

How to go on:
  .venv/bin/pkv chat $run                   talk with the model; --show-competition unfolds the fight
  .venv/bin/tensorboard --logdir $run/tb    curves, also under "Custom scalars"
  $run/report.html                          the report, one file for any browser
TEXT
