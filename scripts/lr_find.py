"""Find a learning rate: train some steps with a growing one, and draw the loss.

python scripts/lr_find.py --vision_model ViT-B/32 --dataset_root DATA --batch_size 256
python scripts/lr_find.py --vision_model tiny --dataset shapes --max_lr 0.1 --output curve.png

It takes main.py's options. The weights are discarded, and no run's folder is written to.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser
from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0])
    group = parser.add_argument_group("lr_find options")
    group.add_argument("--min_lr", type=float, default=1e-7, help="first learning rate (default: %(default)s)")
    group.add_argument("--max_lr", type=float, default=1e-2, help="last learning rate (default: %(default)s)")
    group.add_argument("--steps", type=int, default=100, help="number of steps (default: %(default)s)")
    group.add_argument(
        "--output", type=Path, default=Path("lr_find.svg"), help="curve, .svg or .png (default: %(default)s)"
    )
    typed = vars(parser.parse_args())
    own = {name: typed.pop(name) for name in ("min_lr", "max_lr", "steps", "output")}

    from clip_retrieval.lr_find import lr_find

    lr_find(typed, **own)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
