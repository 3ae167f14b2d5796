# Sourced by quickstart.sh and test.sh: make .venv in the project root and install the requirements named as arguments.
# PYTHON=python3.12 chooses the interpreter. Nothing is installed again until a requirements file changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
wanted=$(cat "$@" | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    for file in "$@"; do
        echo "installing $file (PyTorch is large: some minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    done
    echo "$wanted" > .venv/installed
fi
