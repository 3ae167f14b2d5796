#!/usr/bin/env bash
# Finetune ViT-B/16 on COCO.     bash scripts/coco_finetune_vit-b-16.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset_root "${1:?give the folder of the data}" --vision_model ViT-B/16 \
    --batch_size 128 --epochs 5 --lr 1e-5 --warmup 500 --experiments coco_vit-b-16 "${@:2}"
