#!/usr/bin/env bash
# Train only the two projections of ViT-L/14 on COCO with the margin-pairwise loss.
#     bash scripts/coco_margin_linear_projection.sh DATA [further options of main.py]
#
# --preset crossmodal has the settings of Clip_crossmodal_retrieval, with a constant learning rate. This recipe differs: the
# rate is warmed up over a tenth of the run and falls to 0 (--warmup 0 --schedule constant for that system's).
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --preset crossmodal --dataset_root "${1:?give the folder of the data}" \
    --trainable linear_projection --warmup 0.1 --schedule cosine --experiments coco_margin_linear_projection "${@:2}"
