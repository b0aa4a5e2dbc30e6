#!/bin/sh
# Runs the tests: test.sh OLDEST_POSTGRES_BIN [PYTEST ARGUMENT...]. Without arguments the storage tests run first on the
# oldest supported Postgres, where that is installed; then everything on the embedded one, so that its summary is last.
set -eu
cd "$(dirname "$0")/.."
oldest=$1
shift

if [ $# -eq 0 ] && [ -d tests/integration/storage ]; then
    if [ -x "$oldest/postgres" ] && [ -x "$oldest/initdb" ]; then
        echo "Storage tests on $("$oldest/postgres" --version)"
        OUTRIDER_TEST_POSTGRES_BIN=$oldest .venv/bin/python -m pytest -q tests/integration/storage
    else
        echo "Storage tests on Postgres 15: skipped, $oldest holds no server"
    fi
fi
exec .venv/bin/python -m pytest "$@"
