#!/usr/bin/env bash
# Finds a Python that has the packages, or makes .venv from requirements.lock, and hands over:
# ./run_all.sh [options] is `python -m lib run [options]`.
set -euo pipefail
export CXR_CALLED_FROM=$PWD
exec 3>&1
die() { printf 'error: %s\n' "$1" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
venv_python() {
    if [ -d .venv/Scripts ]; then echo .venv/Scripts/python.exe; else echo .venv/bin/python; fi
}
has_all() { # whether Python $1 has the packages; ends here for --help and for a wrong option
    new_enough "$1" || return 1
    case " ${*:2} " in *" --help "* | *" -h "*) exec "$1" -m lib "${@:2}" >&3 ;; esac
    local status=0
    "$1" -m lib --check "${@:2}" || status=$?
    case $status in 0) ;; 3) return 1 ;; *) exit $status ;; esac
}

if [ -n "${PYTHON:-}" ]; then # as the caller means it, before we leave the caller's folder
    PYTHON=$(command -v -- "$PYTHON") || die "PYTHON names no program: give the path of a Python"
    case $PYTHON in /* | [A-Za-z]:*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
    new_enough "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or newer"
fi
CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

# 1. The Python that is named, or that of the active environment; .venv, unless its lock has changed
named=${PYTHON:-${VIRTUAL_ENV:+python}}
named=${named:-${CONDA_PREFIX:+python}}
if [ -n "$named" ] && has_all "$named" "$@"; then exec "$named" -m lib "$@"; fi
lock=$(cksum <requirements.lock)
made_from=$(cat .venv/.made-from 2>/dev/null || echo "$lock")
if [ ! -e .venv/.incomplete ] && [ "$made_from" = "$lock" ]; then
    if has_all "$(venv_python)" "$@"; then exec "$(venv_python)" -m lib "$@"; fi
fi

# 2. A new .venv; .incomplete is the first file of an install, .made-from the last
for base in "${PYTHON:-python3}" python3.11 python3.12 python3.13 python3.14 python none; do
    if new_enough "$base"; then break; fi
done
[ "$base" != none ] || die "Python 3.11 or newer is needed: install one, or set PYTHON to one"
has_all "$base" "$@" >/dev/null || true # a mistyped option should cost no install
"$base" -c 'import ensurepip, venv' || die "$base lacks venv; on Debian: apt install python3-venv"
if kill -0 "$(cat .venv/.incomplete 2>/dev/null)" 2>/dev/null; then
    die "another run_all.sh is making .venv: wait for it"
elif [ -e .venv/.incomplete ] || { [ -e .venv/.made-from ] && ! new_enough "$(venv_python)"; }; then
    rm -rf .venv # broken off, or without its Python
fi
echo "making .venv from requirements.lock; this is done once and takes some minutes"
mkdir -p .venv && echo $$ >.venv/.incomplete && rm -f .venv/.made-from
new_enough "$(venv_python)" || "$base" -m venv .venv
install() { "$(venv_python)" -m pip install --quiet --disable-pip-version-check "$@"; }
install -r requirements.lock && install --no-deps -e . ||
    die "the install broke off; the same command tries again"
rm .venv/.incomplete && echo "$lock" >.venv/.made-from
exec "$(venv_python)" -m lib "$@"
