"""Compare this tool with published numbers: evaluate named models, and name what usually causes a gap.

python scripts/verify.py DATA --models ViT-B/32 ViT-B-16-SigLIP2      on COCO 5K
python scripts/verify.py DATA --dataset flickr30k                      all models with published numbers
python scripts/verify.py DATA --models ViT-B/32 --pretrained FILE      weights of your own
python scripts/verify.py --list                                        the published numbers, with their sources

A model is ok if all its recalls are within 0.3 of the published ones. The exit code is 3 if one is not. Results are
printed, and written to logs/verify/verify.json.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser, take_values
from clip_retrieval.errors import UserError, run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=())
    group = parser.add_argument_group("verification options")
    group.add_argument("data", nargs="?", help="folder of the data set, as main.py's --dataset_root")
    group.add_argument("--dataset", help="coco, flickr30k, flickr30k_cn, coco_cn or muge (default: coco)")
    group.add_argument("--models", nargs="+", help="models, or MODEL:TAG (default: all with published numbers)")
    group.add_argument("--table", help="CSV of published numbers (default: the one that comes with the tool)")
    group.add_argument("--output", help="folder of the results (default: logs/verify)")
    parser.add_argument("--list", action="store_true", help="print the published numbers and exit")
    add_arguments(parser, ModelOptions, only=("pretrained",))
    add_arguments(parser, RunOptions, only=("device",))
    add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision"))
    add_arguments(parser, DataOptions, only=("num_workers", "decoder", "image_cache"))
    typed = vars(parser.parse_args())
    own = take_values(group, typed, paths=("data", "table", "output"))

    from clip_retrieval.verify import PUBLISHED, read_published, verify

    if typed.pop("list", False):
        for row in read_published(Path(own.get("table", PUBLISHED))):
            recalls = ", ".join(f"{name} {value:.2f}" for name, value in row.recalls.items() if name.endswith("R@1"))
            print(f"{row.dataset:13}{row.name}\n    {recalls}; {row.source}")
        return
    if own.get("data") is None:
        raise UserError("give the folder of the data set, or --list")
    verify(typed, **own)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
