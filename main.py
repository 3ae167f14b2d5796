"""Finetune CLIP for image-text retrieval, or evaluate it.

python main.py --vision_model ViT-B/32 --dataset_root DATA    # finetune on COCO
python main.py --eval --resume logs/ex0/best.pt               # evaluate a checkpoint
python main.py --eval --vision_model ViT-L/14                 # evaluate pretrained weights
"""

import sys

from clip_retrieval.command_line import parse
from clip_retrieval.config import read_config
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.log import log, start_log
from clip_retrieval.signals import ignore_stop_signals


def main() -> None:
    typed = parse()
    config = read_config(typed.get("config"))
    from clip_retrieval.run.merge import check_early  # not for --help: it loads numpy

    check_early(typed, config)
    start_log()
    log.info("loading torch and open_clip")  # it takes seconds, on a network disk a minute
    if typed.get("eval", config.get("eval")):
        from clip_retrieval.evaluate import evaluate

        return evaluate(typed, config)
    from clip_retrieval.finetune import finetune

    return finetune(typed, config)


if __name__ == "__main__":
    code = run_with_exit_code(main)
    ignore_stop_signals()
    sys.exit(code)
