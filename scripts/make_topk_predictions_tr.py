"""Write the exact top texts of each image, best first, one line each: {"image_id": ..., "text_ids": [...]}.

python scripts/make_topk_predictions_tr.py --image-feats DATA/test_imgs.img_feat.jsonl \
    --text-feats DATA/test_texts.txt_feat.jsonl --top-k 10 --output DATA/test_tr_predictions.jsonl
"""

import sys

import _path  # noqa: F401
import make_topk_predictions

from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    make_topk_predictions.main(__doc__, "i2t")


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
