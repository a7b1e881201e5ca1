#!/usr/bin/env bash
# Finds an environment, or makes .venv from requirements.lock, and hands over to `python -m lib.run`.
# ./run_all.sh --help tells the options.
set -euo pipefail

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # the folder of the script, not of a link to it
    link=$(readlink "$self")
    case $link in /*) self=$link ;; *) self=$(dirname -- "$self")/$link ;; esac
done
root=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd)
export CXR_CALLED_FROM=$PWD

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}

for argument in "$@"; do
    case $argument in
        --help) sed -n '/^USAGE = /,/^"""/{/"""/!p;}' "$root/lib/run.py" && exit ;;
        --test) break ;;
    esac
done

# PYTHON as the caller means it, before we leave the caller's folder
if [ -n "${PYTHON:-}" ]; then
    given=$PYTHON
    PYTHON=$(command -v -- "$given") || die "PYTHON=$given is not a program"
    case $PYTHON in /* | [A-Za-z]:*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
fi
cd -- "$root"

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

new_enough() { [ "$("$1" -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)" = True ]; }

# lacks PYTHON ARGUMENTS: the packages that are missing, or nothing
lacks() {
    new_enough "$1" || { echo "Python 3.11"; return; }
    "$1" -c 'import sys; from lib.run import missing_packages as m; print(", ".join(m("--test" in sys.argv)))' "$@" || echo "a Python that works"
}

venv_python() {
    local candidate
    for candidate in .venv/bin/python .venv/Scripts/python.exe; do
        if [ -x "$candidate" ]; then
            printf '%s\n' "$root/$candidate"
            return
        fi
    done
}

# 1. The Python that was named, else the active environment, if it has what is needed
note=''
if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || die "PYTHON=$given is not Python 3.11 or newer (it says: $(python_version "$PYTHON" || echo nothing))"
    candidates=$PYTHON
else
    candidates="${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python
$VIRTUAL_ENV/Scripts/python.exe}
${CONDA_PREFIX:+$CONDA_PREFIX/bin/python
$CONDA_PREFIX/python.exe}"
fi
while IFS= read -r candidate; do
    if [ -x "$candidate" ] && [ "$candidate" != "$(venv_python)" ]; then
        missing=$(lacks "$candidate" "$@")
        [ -n "$missing" ] || exec "$candidate" -m lib.run "$@"
        note="$candidate lacks $missing: "
    fi
done <<<"$candidates"

# 2. .venv, if it is whole. The stamp is the last thing an install writes, .incomplete the first.
stamp=.venv/.made-from
lock=$(cksum <requirements.lock)
py=$(venv_python)
if [ -n "$py" ] && [ ! -e .venv/.incomplete ]; then
    if [ "$(cat $stamp 2>/dev/null)" = "$lock" ]; then
        "$py" -c '' 2>/dev/null && exec "$py" -m lib.run "$@"
    elif [ ! -e $stamp ] && [ -z "$(lacks "$py" "$@")" ]; then # made by hand, and complete
        exec "$py" -m lib.run "$@"
    fi
fi

# 3. A new .venv
base=''
for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3.14 python; do
    if new_enough "$candidate"; then
        base=$candidate
        break
    fi
done
[ -n "$base" ] || die "Python 3.11 or newer is needed, and python3 here is $(python_version python3 || echo 'not there'); install one, or name one with PYTHON=..."
# a mistyped option should not cost an install
"$base" -c 'import sys; from lib.run import main; sys.exit(main(sys.argv[1:], check_only=True))' "$@"
"$base" -c 'import ensurepip, venv' 2>/dev/null || die "$base lacks venv or ensurepip; install it (Debian and Ubuntu: apt install python3-venv), or name another with PYTHON=..."
if [ -e .venv/.incomplete ] && kill -0 "$(cat .venv/.incomplete)" 2>/dev/null; then
    die "another run_all.sh is making .venv (process $(cat .venv/.incomplete)); wait for it"
fi
if [ -e .venv/.incomplete ] || { [ -e $stamp ] && ! new_enough "$py"; }; then
    rm -rf .venv # ours, and broken off or without its Python
elif [ -e .venv ] && ! new_enough "${py:-none}"; then
    die ".venv was not made by this script and has no Python 3.11 or newer; rename or remove it"
fi
printf '%s\n' "${note}making .venv from requirements.lock; this is done once and takes some minutes"
mkdir -p .venv
echo $$ >.venv/.incomplete
rm -f $stamp
[ -n "$(venv_python)" ] || "$base" -m venv .venv || die "$base could not make .venv"
py=$(venv_python)
"$py" -m pip install --quiet --disable-pip-version-check -r requirements.lock || die "the install broke off; the same command tries again"
"$py" -m pip install --quiet --disable-pip-version-check --no-deps -e . || die "the install broke off; the same command tries again"
rm .venv/.incomplete
printf '%s\n' "$lock" >$stamp
exec "$py" -m lib.run "$@"
