# Sourced by the scripts that start pkv on other machines: values checked, commands run or only printed, and the commit
# that is shipped. Not run by itself.
# shellcheck shell=bash
# shellcheck source=launch/environment.sh
source launch/environment.sh

dry_run=false     # --dry-run: print the commands, run none
allow_dirty=false # --allow-dirty: ship the commit, though there are changes beside it
commit=''         # what is shipped, in `bundle`
bundle=''
arguments=() # the pkv command, behind --
# shellcheck disable=SC2034
environment=() # NAME=VALUE for pkv, of --env

# quoted WORDS...: one line that bash takes apart into the same words.
quoted() {
    local word line='' apostrophe="'\\''"
    for word in "$@"; do
        case $word in
        *[[:cntrl:]]*) printf -v word %q "$word" ;;
        '' | *[!-_=+,.:/@%A-Za-z0-9]*) word=\'${word//\'/"$apostrophe"}\' ;;
        esac
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# perform COMMAND...: run it, or with --dry-run print it.
perform() {
    if $dry_run; then quoted "$@"; else "$@"; fi
}

# must_have COMMAND WHAT: stop where it isn't here, unless it is only printed.
must_have() {
    $dry_run || command -v "$1" >/dev/null || stop "$1: no such command here; install $2"
}

# must_match WHAT VALUE REGEX EXPECTED: stop unless the whole value matches.
must_match() {
    [[ $2 =~ ^($3)$ ]] || stop "$1: got $(quoted "$2"), expected $4"
}

must_be_name() {
    must_match "$1" "$2" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "a letter, then letters, digits, hyphens, lower case, up to 40"
}

# runtime_of TYPE: the TPU software that Google names for a slice.
runtime_of() {
    case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    esac
}

# must_be_given WHO COUNT: stop without a pkv command.
must_be_given() {
    (($2)) || stop "$1: expected a pkv command behind --, as in: -- train CONFIG --run /mnt/pkv/NAME"
}

# read_options OF KNOWN FLAGS ARGUMENTS...: every option's value into the variable of its name, a flag's is true, and what
# stands behind -- into `arguments`.
read_options() {
    local of=$1 known=$2 flags="--dry-run --allow-dirty $3"
    shift 3
    while (($#)); do
        if [[ $1 == -- ]]; then
            # shellcheck disable=SC2034
            arguments=("${@:2}")
            must_not_pretend "${@:2}" && break
        elif [[ $1 == --*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue
        elif [[ $1 == --[a-z]* && " $flags " == *" $1 "* ]]; then
            take "${1#--}" true
        else
            [[ $1 == --[a-z]* && " $known " == *" $1 "* ]] ||
                stop "$(quoted "$1"): unknown option$of; see launch/$(basename "$0") help"
            (($# > 1)) || stop "$1: expected a value after it"
            take "${1#--}" "$2" && shift
        fi
        shift
    done
}

# must_not_pretend WORDS...: stop where somebody takes for a dry run what would rent machines.
must_not_pretend() {
    local word
    for word in "$@"; do
        [[ $word != --dry-run ]] || stop "--dry-run: expected before --, as pkv's own commands have no such option"
    done
}

# take OPTION VALUE: into the variable of that name; --env may come several times.
take() {
    if [[ $1 == env ]]; then environment+=("$2"); else printf -v "${1//-/_}" %s "$2"; fi
}

# check_environment: every --env is NAME=VALUE. A value may be a secret: it is never said, a dry run has HIDDEN for it.
check_environment() {
    local pair checked=()
    for pair in ${environment[@]+"${environment[@]}"}; do
        [[ $pair == *=* ]] || stop "--env: got no =, expected NAME=VALUE"
        must_match --env "${pair%%=*}=" '[A-Za-z_][A-Za-z0-9_]*=' "NAME=VALUE"
        if $dry_run; then pair=${pair%%=*}=HIDDEN; fi
        checked+=("$pair")
    done
    environment=(${checked[@]+"${checked[@]}"})
}

# The header of the script that runs, as its help.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "launch/$(basename "$0")"
}

# run_folder WORDS...: the directory that `--run` names in a pkv command, or nothing.
run_folder() {
    local word before=''
    for word in "$@"; do
        if [[ $before == --run ]]; then printf '%s\n' "$word"; fi
        if [[ $word == --run=* ]]; then printf '%s\n' "${word#--run=}"; fi
        before=$word
    done | tail -n 1
}

# must_go_on WORDS...: stop where each restart would remove what the last one made.
must_go_on() {
    [[ " $* " != *" --fresh "* ]] ||
        stop "--fresh: a restart would begin anew, and remove what was trained; leave it out, or name another --run"
}

# must_last WHERE WORDS...: stop unless the pkv command trains into a directory that outlives the machines.
must_last() {
    local where=$1 folder
    shift
    [[ ${1-} == train ]] || stop "expected a command that resumes behind --, as in: -- train CONFIG --run $where/NAME"
    must_go_on "$@"
    folder=$(run_folder "$@")
    [[ $folder == "$where"/?* && $folder/ != */../* ]] ||
        stop "--run: got $(quoted "$folder"), expected a directory below $where, on a bucket or a persistent disk:" \
            "the machines' own disks go with them"
}

# pin_commit: what is shipped is HEAD; nothing is fetched from any host.
pin_commit() {
    commit=$(git rev-parse --verify --quiet HEAD) || stop "$PWD: no commit here; what is shipped is a commit"
    bundle=build/pkv-$commit.bundle
    [[ -n $(git status --porcelain) ]] || return 0
    $allow_dirty || stop "there are changes that are not committed, and a commit is what is shipped: commit them," \
        "or leave them here with --allow-dirty"
    echo "NOTICE: what is not committed stays here; shipped is $commit" >&2
}

# Put the pinned commit into `bundle`, once: HEAD may be elsewhere when a lost machine is replaced, days later.
# A bundle has to hold what its commits came from, or nothing can be fetched from it.
packed=false
pack() {
    [[ $(git rev-parse --is-shallow-repository) != true ]] ||
        stop "$PWD: a shallow clone cannot be shipped; get what it lacks: git fetch --unshallow"
    $packed || { perform mkdir -p build && perform git bundle create --quiet "$bundle" HEAD; } || return
    packed=true
}
