#!/usr/bin/env bash
# Train a small CLIP from scratch on drawn shapes and evaluate it, in minutes, without a GPU or data.
#
#     bash scripts/quickstart.sh [further options of main.py]
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/quickstart.sh    # torch without CUDA
source "$(dirname "$0")/setup.sh" requirements.txt
.venv/bin/python main.py --dataset shapes --vision_model tiny --max_steps 580 --batch_size 128 --lr 1.2e-3 --warmup 50 \
    --weight_decay 0.1 --eval_every 0 --experiments quickstart --overwrite "$@"
