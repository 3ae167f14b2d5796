#!/usr/bin/env bash
# Set up, then lint and test.
#
#     bash scripts/test.sh [arguments of pytest]
source "$(dirname "$0")/setup.sh" requirements.txt requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
