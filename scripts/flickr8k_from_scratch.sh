#!/usr/bin/env bash
# Train a small CLIP from scratch on Flickr8K, on a CPU.     bash scripts/flickr8k_from_scratch.sh DATA [further options]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset flickr8k \
    --dataset_root "${1:?give the folder of the data}" --vision_model small --caption_sampling one --augment crop \
    --batch_size 128 --epochs 24 --lr 1e-3 --warmup 0.2 --eps 1e-8 --weight_decay 0.1 --experiments flickr8k_small "${@:2}"
