# Sourced by quickstart.sh and test.sh: make .venv in the project root and install the requirements named as arguments.
# PYTHON=python3.12 sets the interpreter. A file is installed again only if it has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
for file in "$@"; do
    if ! cmp --silent "$file" ".venv/installed-$file"; then
        echo "installing $file"
        .venv/bin/python -m pip install --disable-pip-version-check -r "$file"
        cp "$file" ".venv/installed-$file"
    fi
done
