#!/usr/bin/env bash
# Finetune Chinese-CLIP ViT-B/16 on COCO-CN, in the folders of Chinese-CLIP's README:
# DATAPATH/datasets/COCO-CN, DATAPATH/pretrained_weights, DATAPATH/experiments.
#
#     bash scripts/coco_cn_finetune_vit-b-16.sh DATAPATH [further options of main.py]
#     GPUS=8 bash scripts/coco_cn_finetune_vit-b-16.sh DATAPATH      # 8 GPUs of this machine
#
# Each GPU adds 1,024 pairs to the global batch, as upstream, and computes 128 at a time. Several machines: see
# chinese_clip_finetune.sh.
set -euo pipefail
exec bash "$(dirname "$0")/chinese_clip_finetune.sh" "${1:?give the folder DATAPATH}" COCO-CN coco_cn_finetune_vit-b-16 \
    --batch_size $((1024 * ${GPUS:-1} * ${NODES:-1})) --grad_cache 128 --lr 3e-5 --warmup 6 --max_epochs 20 \
    --valid_step_interval -1 "${@:2}"
