#!/usr/bin/env bash
# Train only an adaptor after the image tower of ViT-L/14 on COCO with the margin-pairwise loss.
#     bash scripts/coco_margin_adaptor.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset_root "${1:?give the folder of the data}" --vision_model ViT-L/14 \
    --loss margin --margin 0.1 --trainable adaptor --batch_size 256 --epochs 1 --lr 1e-4 \
    --weight_decay 1e-3 --warmup 0.1 --experiments coco_margin_adaptor "${@:2}"
