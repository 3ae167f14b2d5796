#!/usr/bin/env bash
# Train simple-clip's model on COCO with that system's settings (--preset simple_clip): CLIP from scratch, on towers
# pretrained on ImageNet and by masked language modelling. Unlike there, the temperature starts at CLIP's value, and images
# are cropped and normalised. 10 epochs instead of its 2: two epochs of COCO are 884 steps, and its results are those of
# 57,800. Without a network, give files of the weights (--pretrained FILE --text_pretrained FOLDER), or none for random
# weights.
#     bash scripts/coco_from_scratch_simple_clip.sh DATA [further options of main.py]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --preset simple_clip \
    --dataset_root "${1:?give the folder of the data}" --epochs 10 --experiments coco_from_scratch_simple_clip "${@:2}"
