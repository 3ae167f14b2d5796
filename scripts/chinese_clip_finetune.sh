#!/usr/bin/env bash
# Finetune Chinese-CLIP ViT-B/16; muge_, flickr30k_cn_ and coco_cn_finetune_vit-b-16.sh call it with their settings. The
# folders are those of Chinese-CLIP's README: DATAPATH/datasets/DATASET, DATAPATH/pretrained_weights, DATAPATH/experiments.
#
#     bash scripts/chinese_clip_finetune.sh DATAPATH DATASET NAME [options of main.py]
#
# The default is one GPU. GPUS=8 uses eight GPUs of a machine. For several machines, run the command on each of them:
#
#     GPUS=8 NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/muge_finetune_vit-b-16.sh DATAPATH
#     GPUS=8 NODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/muge_finetune_vit-b-16.sh DATAPATH
#
# MASTER_ADDR is the address of the first machine; MASTER_PORT (29500) must be free there. Each machine needs the code,
# the data and the weights; DATAPATH/experiments should be a shared folder, which --resume needs.
set -euo pipefail
data="${1:?give the folder DATAPATH}" dataset="${2:?give the name of the folder in DATAPATH/datasets}" name="${3:?give the name of the run}"
gpus="${GPUS:-1}" nodes="${NODES:-1}"
start=("${PYTHON:-python}")
if [ "$nodes" -gt 1 ]; then
    start+=(-m torch.distributed.run --nnodes "$nodes" --node_rank "${NODE_RANK:?number of this machine, from 0}"
        --master_addr "${MASTER_ADDR:?the first machine}" --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$gpus")
elif [ "$gpus" -gt 1 ]; then
    start+=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
fi
exec "${start[@]}" "$(dirname "$0")/../main.py" --preset chinese_clip --dataset_root "$data/datasets/$dataset" \
    --resume "$data/pretrained_weights/clip_cn_vit-b-16.pt" --logs "$data/experiments" --name "$name" "${@:4}"
