#!/usr/bin/env bash
# Finetune Chinese-CLIP ViT-B/16 on MUGE, in the folders of Chinese-CLIP's README:
# DATAPATH/datasets/MUGE, DATAPATH/pretrained_weights, DATAPATH/experiments.
#
#     bash scripts/muge_finetune_vit-b-16.sh DATAPATH [further options of main.py]
#     GPUS=8 bash scripts/muge_finetune_vit-b-16.sh DATAPATH      # 8 GPUs of this machine
#
# The global batch is 1,024 pairs on any number of GPUs (upstream: 128 on each of 8); each computes 128 at a time.
# Several machines: see chinese_clip_finetune.sh.
set -euo pipefail
exec bash "$(dirname "$0")/chinese_clip_finetune.sh" "${1:?give the folder DATAPATH}" MUGE muge_finetune_vit-b-16 \
    --grad_cache 128 "${@:2}"
