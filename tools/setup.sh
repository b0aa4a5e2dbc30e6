#!/bin/sh
# Finds a Python that can build this checkout's environments and hands over to environment.py: setup.sh [NAME...].
# The variable PYTHON names one; else the newest supported one on the path is taken. Whatever is in the way is told in
# one sentence that says what to do.
set -eu
cd "$(dirname "$0")/.."

stop() {
    printf 'Outrider: %s\n' "$1" >&2
    exit 1
}

# 3: older than 3.11; 4: no way to install anything; else not a Python that runs.
probe='
import importlib.util, shutil, sys
if sys.version_info < (3, 11):
    sys.exit(3)
def has(name):
    try:
        return importlib.util.find_spec(name + ".__main__") is not None
    except ImportError:
        return False
sys.exit(0 if has("venv") and (has("ensurepip") or has("pip") or shutil.which("uv")) else 4)
'
usable() { "$1" -c "$probe" >/dev/null 2>&1; }

case $(uname -s) in
Linux | Darwin) ;;
*) stop "this system, $(uname -s), is not supported: use Linux or macOS (on Windows, WSL)." ;;
esac

# Without a wish for a certain Python, environments that are whole need none to be found.
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] &&
    .venv/bin/python -I tools/environment.py --current "$@" 2>/dev/null; then
    exit 0
fi

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && found=$PYTHON || case $? in
    3) stop "PYTHON=$PYTHON is older than 3.11: name a newer one, for example make PYTHON=python3.11." ;;
    4) stop "PYTHON=$PYTHON has neither ensurepip nor pip: install them (Debian, Ubuntu: apt-get install python3-venv)." ;;
    *) stop "PYTHON=$PYTHON does not run: name a Python 3.11 or newer, for example make PYTHON=python3.11." ;;
    esac
else
    found='' old='' bare=''
    for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
        # Each place on the path counts: a version manager's stand-in may refuse where the system's own would do.
        IFS=:
        for folder in $PATH; do
            unset IFS
            path=$folder/$candidate
            [ -x "$path" ] || continue
            usable "$path" && { found=$path && break 2; } || case $? in
            3) old=$path ;;
            4) bare=$path ;;
            esac
        done
        unset IFS
    done
    if [ -z "$found" ]; then
        [ -z "$bare" ] || stop "$bare has neither ensurepip nor pip: install them (Debian, Ubuntu: apt-get install python3-venv) and run make again."
        [ -z "$old" ] || stop "$old is older than 3.11: install Python 3.11 or newer, or name one with make PYTHON=..."
        stop "no Python was found on the path: install Python 3.11 or newer, or name one with make PYTHON=..."
    fi
fi

exec "$found" tools/environment.py "$@"
