"""Average the weights of several finetunes into one checkpoint: a model soup.

python scripts/soup.py logs/a/best.pt logs/b/best.pt --output soup.pt
python scripts/soup.py logs/a/best.pt logs/b/best.pt logs/c/best.pt --output soup.pt --greedy
    from the best on val on, add each checkpoint with which the mean does not get worse on val

--eval --resume, --pretrained and scripts/export.py read the result.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(DataOptions,))
    parser.usage = "%(prog)s CHECKPOINT CHECKPOINT... --output OUT [options]"
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="checkpoints of ours")
    add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision"))
    add_arguments(parser, RunOptions, only=("device",))
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--greedy", action="store_true", default=False, help="choose the checkpoints on the val split")
    typed = vars(parser.parse_args())
    checkpoints, output, greedy = (typed.pop(name) for name in ("checkpoints", "output", "greedy"))

    from clip_retrieval.soup import make_soup

    make_soup(checkpoints, output, typed, greedy=greedy)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
