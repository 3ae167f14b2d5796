"""Finetune CLIP for image-text retrieval, or evaluate it.

python main.py --vision_model ViT-B/32 --dataset_root DATA    # finetune on COCO
python main.py --eval --resume logs/ex0/best.pt               # evaluate a checkpoint
python main.py --eval --vision_model ViT-L/14                 # evaluate pretrained weights
"""

import sys

from clip_retrieval.command_line import parse
from clip_retrieval.config import read_config
from clip_retrieval.errors import run_and_exit


def main() -> None:
    typed = parse()
    if typed.get("eval", read_config(typed.get("config")).get("eval")):
        from clip_retrieval.evaluate import evaluate

        return evaluate(typed)
    from clip_retrieval.finetune import finetune

    return finetune(typed)


if __name__ == "__main__":
    sys.exit(run_and_exit(main))
