#!/usr/bin/env bash
# Train simple-clip's model on COCO with that system's settings: CLIP from scratch, on towers pretrained on ImageNet and
# by masked language modelling. Unlike there, the temperature starts at CLIP's value, and images are cropped and
# normalised. Without a network, give files of the weights (--pretrained FILE --text_pretrained FOLDER), or none for
# random weights.
#     bash scripts/coco_from_scratch_simple_clip.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset_root "${1:?give the folder of the data}" \
    --vision_model resnet50 --pretrained IMAGENET1K_V2 --text_pretrained distilbert-base-uncased --image_size 224 \
    --caption_sampling one --batch_size 256 --epochs 10 --lr 1e-4 --warmup 0 --weight_decay 0 --beta2 0.999 \
    --eps 1e-8 --fp16_precision --experiments coco_from_scratch_simple_clip "${@:2}"
