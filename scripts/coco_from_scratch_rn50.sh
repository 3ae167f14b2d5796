#!/usr/bin/env bash
# Train clip-training's model from scratch on COCO, with that system's settings.
#     bash scripts/coco_from_scratch_rn50.sh DATA [further options of main.py]
set -euo pipefail
here="$(dirname "$0")"
exec "${PYTHON:-python}" "$here/../main.py" --config "$here/clip_training.yaml" \
    --dataset_root "${1:?give the folder of the data}" "${@:2}"
