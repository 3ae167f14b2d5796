#!/usr/bin/env bash
# Set up, lint, check the types and test. --full also runs the longest tests and the fault campaigns (one or two hours).
#
#     bash scripts/test.sh [--full] [arguments of pytest]
source "$(dirname "$0")/setup.sh" requirements.txt requirements-dev.txt
full=false
if [ "${1:-}" = --full ]; then
    full=true
    shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/mypy main.py scripts
MYPYPATH=benchmarks .venv/bin/mypy benchmarks
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
if $full; then
    .venv/bin/python -m pytest -n 2 -m full
    .venv/bin/python -m tests.faults.full
fi
