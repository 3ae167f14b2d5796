"""Write image and text features of any model and any data set.

python scripts/extract_features.py --resume logs/ex0/best.pt
    the test split of the checkpoint's data set, to logs/ex0/features_{data set}_test/: image_features.npy,
    image_ids.json, text_features.npy, text_ids.json, and pairs.npy for evaluate_features.py
python scripts/extract_features.py --resume clip_cn_vit-b-16.pt --vision-model ViT-B-16 \
    --text-model RoBERTa-wwm-ext-base-chinese --extract-image-feats --extract-text-feats \
    --image-data DATA/lmdb/test/imgs --text-data DATA/test_texts.jsonl
    Chinese-CLIP's files, to DATA/test_imgs.img_feat.jsonl and DATA/test_texts.txt_feat.jsonl
torchrun --nproc_per_node 8 scripts/extract_features.py ...
    the same on 8 GPUs

Features are L2-normalised. Output files that end in .npy are arrays, all others hold one JSON record per line.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(ModelOptions, DataOptions))
    add_arguments(parser, RunOptions, only=("resume", "checkpoint_path", "device"))
    add_arguments(parser, EvalOptions, only=("eval_split", "eval_precision"))
    group = parser.add_argument_group("extraction options")
    group.add_argument("--extract_image_feats", action="store_true", help="only images; with the next: both")
    group.add_argument("--extract_text_feats", action="store_true", help="only texts (default: all that is given)")
    group.add_argument("--image_data", type=Path, help="folder lmdb/.../imgs or ..._imgs.tsv, instead of a data set")
    group.add_argument("--text_data", type=Path, help="..._texts.jsonl, instead of a data set")
    group.add_argument("--output", type=Path, help="folder of a data set's features")
    group.add_argument("--image_feat_output_path", type=Path, help="file of the image features, .npy or .jsonl")
    group.add_argument("--text_feat_output_path", type=Path, help="file of the text features, .npy or .jsonl")
    group.add_argument("--img_batch_size", type=int, help="images to encode at a time in each process")
    group.add_argument("--text_batch_size", type=int, help="texts to encode at a time in each process")
    typed = vars(parser.parse_args())
    own = {action.dest: typed.pop(action.dest) for action in group._group_actions if action.dest in typed}

    from clip_retrieval.extract import ExtractionRequest, extract

    extract(typed, ExtractionRequest(**own))


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
