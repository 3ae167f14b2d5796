#!/usr/bin/env bash
# Finetune ViT-B/32 on COCO with the GPUs of several machines. Run on each machine, at about the same time:
#
#     NODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/coco_finetune_multi_node.sh DATA [further options of main.py]
#     NODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/coco_finetune_multi_node.sh DATA [further options of main.py]
#
# MASTER_ADDR is the address of the first machine; MASTER_PORT (29500) must be free there. Each machine needs the code,
# the data and the weights. The first machine writes the run's files; --resume reads them on every machine, so use a
# shared folder as --checkpoint_path. GPUS=4 uses four GPUs of a machine instead of all. Under Slurm: srun, one task per
# node, with NODE_RANK=$SLURM_NODEID.
set -euo pipefail
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "${NODES:?number of machines}" --node_rank "${NODE_RANK:?number of this machine, from 0}" \
    --master_addr "${MASTER_ADDR:?the first machine}" --master_port "${MASTER_PORT:-29500}" --nproc_per_node "${GPUS:-gpu}" \
    "$(dirname "$0")/../main.py" --dataset_root "${1:?give the folder of the data}" --vision_model ViT-B/32 \
    --batch_size 2048 --epochs 10 --lr 3e-5 --warmup 0.1 --experiments coco_vit-b-32_multi_node "${@:2}"
