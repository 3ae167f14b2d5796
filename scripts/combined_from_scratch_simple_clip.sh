#!/usr/bin/env bash
# Train simple-clip's model on COCO, TextCaps and SBU captions together, with that system's settings; val is COCO's. Fetch
# the data with get_simple_clip_data.sh. For COCO in its own format: `--dataset coco --dataset textcap --dataset
# sbucaptions`.
#     bash scripts/combined_from_scratch_simple_clip.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset combined \
    --dataset_root "${1:?give the folder of the data}" --vision_model resnet50 --pretrained IMAGENET1K_V2 \
    --text_pretrained distilbert-base-uncased --image_size 224 --caption_sampling one --batch_size 256 --epochs 2 \
    --lr 1e-4 --warmup 0 --weight_decay 0 --beta2 0.999 --eps 1e-8 --fp16_precision \
    --experiments combined_from_scratch_simple_clip "${@:2}"
