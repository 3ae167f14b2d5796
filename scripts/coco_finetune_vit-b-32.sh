#!/usr/bin/env bash
# Finetune ViT-B/32 on COCO.     bash scripts/coco_finetune_vit-b-32.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset_root "${1:?give the folder of the data}" --vision_model ViT-B/32 \
    --batch_size 256 --epochs 10 --lr 1e-5 --warmup 500 --experiments coco_vit-b-32 "${@:2}"
