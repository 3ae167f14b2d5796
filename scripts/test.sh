#!/usr/bin/env bash
# Set up, then lint and test; with --full also run the fault campaigns (an hour or two), and print their tables.
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
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
if $full; then
    .venv/bin/python -m tests.faults.full
fi
