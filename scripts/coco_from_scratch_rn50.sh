#!/usr/bin/env bash
# Train clip-training's model from scratch on COCO, with that system's settings (--preset clip_training).
#     bash scripts/coco_from_scratch_rn50.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --preset clip_training \
    --dataset_root "${1:?give the folder of the data}" --experiments coco_from_scratch_rn50 "${@:2}"
