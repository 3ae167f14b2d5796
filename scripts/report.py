"""Write report.html of a run: metrics, figures, and the retrieved images and captions to look at.

python scripts/report.py logs/ex0                   # a finetune: its best checkpoint on its test split
python scripts/report.py logs/ex0/eval_coco_test    # an evaluation
python scripts/report.py logs/ex0 logs/ex1          # two runs on the same data: queries won and lost

The images and captions are encoded again. The report is one file that needs no network.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(DataOptions,))
    parser.usage = "%(prog)s RUN [OTHER_RUN] [options]"
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finetune or of an evaluation")
    parser.add_argument(
        "other", metavar="OTHER_RUN", nargs="?", default=None, type=Path, help="another one, on the same data"
    )
    add_arguments(parser, EvalOptions, only=("eval_split", "eval_batch_size", "eval_precision", "recall_k"))
    add_arguments(parser, RunOptions, only=("device",))
    parser.add_argument("--output", type=Path, help="file to write (default: RUN/report.html)")
    typed = vars(parser.parse_args())
    run, other, output = (typed.pop(name, None) for name in ("run", "other", "output"))

    from clip_retrieval.report import report

    report(run, other, output, typed)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
