#!/usr/bin/env bash
# Evaluate a checkpoint on the COCO 5K test images.     bash scripts/coco_eval.sh DATA CHECKPOINT [further options]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --eval --dataset_root "${1:?give the folder of the data}" --resume "${2:?give the checkpoint}" "${@:3}"
