#!/usr/bin/env bash
# Train simple-clip's model on COCO, TextCaps and SBU captions together, with that system's settings (--preset simple_clip);
# val is COCO's. Fetch the data with get_simple_clip_data.sh. For COCO in its own format: `--dataset coco --dataset textcap
# --dataset sbucaptions`.
#     bash scripts/combined_from_scratch_simple_clip.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --preset simple_clip --dataset combined \
    --dataset_root "${1:?give the folder of the data}" --experiments combined_from_scratch_simple_clip "${@:2}"
