#!/usr/bin/env bash
# Evaluate OpenAI's nine models on the COCO 5K test images without finetuning, and write a Markdown table.
#     bash scripts/coco_zero_shot_table.sh DATA [further options of main.py]
# MODELS="RN50 ViT-B/32" sets the models, OUTPUT=DIR the folder (default: logs/coco_zero_shot).
set -euo pipefail
scripts=$(dirname "$0")
python=${PYTHON:-python}
output=${OUTPUT:-logs/coco_zero_shot}
results=()
for model in ${MODELS:-RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B/32 ViT-B/16 ViT-L/14 ViT-L/14@336px}; do
    name=${model//\//-}
    "$python" "$scripts/../main.py" --eval --dataset_root "${1:?give the folder of the data}" --vision_model "$model" \
        --checkpoint_path "$output" --experiments "$name" "${@:2}"
    results+=("$output/$name/results.json")
done
"$python" "$scripts/results_table.py" "${results[@]}" --output "$output/table.md"
