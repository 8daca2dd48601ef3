# Sourced by the scripts beside it: a Python, and a virtual environment with pkv in it. Not run by itself.
# shellcheck shell=bash

# Stop with one line on stderr.
stop() {
    printf '%s\n' "$*" >&2
    exit 2
}

# Print the first Python that is new enough; PYTHON=/path/to/python overrides the search.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ -n ${PYTHON:-} ]]; then
            stop "PYTHON=$PYTHON: expected Python 3.11 or newer that starts"
        fi
    done
    stop "pkv needs Python 3.11 or newer, found none; install one, or name it: PYTHON=/path/to/python bash $0"
}

# make_environment DIR EXTRAS: DIR has pkv (editable) with these extras; made once, again when pyproject.toml or the
# lock changes.
make_environment() {
    local folder=$1 extras=$2 python wanted
    local stamp=$folder/.pkv-installed-$extras
    if ! "$folder/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$(find_python) || exit 2
        echo "Making $folder with $("$python" --version)"
        "$python" -m venv --clear "$folder" ||
            stop "$python cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)"
    fi
    wanted="$PWD"$'\n'"$(<pyproject.toml)"
    if [[ -f requirements.lock ]]; then wanted+=$'\n'"$(<requirements.lock)"; fi
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        echo "Using $folder"
        return
    fi
    echo "Installing pkv [$extras] and what it needs into $folder (some minutes the first time)"
    install_into "$folder" --editable ".[$extras]" || stop "pip could not install pkv; what it said stands above"
    printf '%s\n' "$wanted" >"$stamp"
}

# install_into DIR ARGUMENTS...: pip install, quietly; errors are shown.
install_into() {
    local folder=$1
    shift
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
}
