#!/usr/bin/env bash
# Finetune Chinese-CLIP ViT-B/16 on Flickr30K-CN, in the folders of Chinese-CLIP's README:
# DATAPATH/datasets/Flickr30k-CN, DATAPATH/pretrained_weights, DATAPATH/experiments.
#
#     bash scripts/flickr30k_cn_finetune_vit-b-16.sh DATAPATH [further options of main.py]
#     GPUS=8 bash scripts/flickr30k_cn_finetune_vit-b-16.sh DATAPATH      # 8 GPUs of this machine, 128 pairs per GPU
set -euo pipefail
data="${1:?give the folder DATAPATH}" gpus="${GPUS:-1}"
start=("${PYTHON:-python}")
if [ "$gpus" -gt 1 ]; then
    start+=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
fi
exec "${start[@]}" "$(dirname "$0")/../main.py" --dataset chinese --dataset_root "$data/datasets/Flickr30k-CN" \
    --resume "$data/pretrained_weights/clip_cn_vit-b-16.pt" --logs "$data/experiments" --name flickr30k_cn_finetune_vit-b-16 \
    --context_length 52 --batch_size $((128 * gpus)) --warmup 100 --lr 5e-5 --wd 0.001 --max_epochs 3 \
    --valid_step_interval 150 --use_augment "${@:2}"
