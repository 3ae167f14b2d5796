"""WiSE-FT: score weights between the start and the end of a finetune, and keep the best on val.

python scripts/interpolate.py openai logs/ex0/best.pt
python scripts/interpolate.py openai logs/ex0/best.pt --zero_shot_eval cifar100 --zero_shot_root DIR
    also the zero-shot accuracy for each alpha
python scripts/interpolate.py openai logs/ex0/best.pt --retention_dataset flickr30k --retention_weight 0.5
    also the rsum on other data, and alpha is chosen by val rsum + 0.5 x this rsum
python scripts/interpolate.py start.pt logs/ex0/best.pt --alphas 0 0.25 0.5 0.75 1 --output OUT

START is anything that --pretrained accepts. The data are those of the finetune unless options name others. A table is
printed; results.json, interpolation.png and the chosen checkpoint, interpolated.pt, are written.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import BELONGING, DataOptions, EvalOptions, RunOptions

ALPHAS = tuple(step / 10 for step in range(11))
EVALUATION = ("eval_batch_size", "eval_precision", "recall_k", "zero_shot_eval", *BELONGING["zero_shot_eval"][:3])
EVALUATION += ("retention_dataset", "retention_root", "retention_weight")


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(DataOptions,))
    parser.usage = "%(prog)s START FINETUNED [options]"
    parser.add_argument("start", metavar="START", help="the starting weights: anything that --pretrained accepts")
    parser.add_argument("finetuned", metavar="FINETUNED", type=Path, help="a checkpoint of ours")
    add_arguments(parser, EvalOptions, only=EVALUATION)
    add_arguments(parser, RunOptions, only=("device",))
    parser.add_argument(
        "--alphas", nargs="+", type=float, default=ALPHAS, help="shares of FINETUNED (default: 0 0.1 ... 1)"
    )
    parser.add_argument("--output", type=Path, default=None, help="folder (default: beside FINETUNED)")
    typed = vars(parser.parse_args())
    start, finetuned, alphas, output = (typed.pop(name) for name in ("start", "finetuned", "alphas", "output"))

    from clip_retrieval.interpolate import interpolate

    interpolate(start, finetuned, alphas, typed, output)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
