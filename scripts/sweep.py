"""Finetune with different option values, one run after another, and compare the runs in a table and a page.

python scripts/sweep.py --grid lr=1e-5,3e-5 batch_size=128,256 -- --vision_model ViT-B/32 --dataset_root DATA
python scripts/sweep.py --values seed=1,2,3 --ablate ema=0.999 "trainable=lora lr=2e-4" -- --dataset_root DATA
python scripts/sweep.py --random 20 --values lr=log:1e-6:1e-4 weight_decay=0.1,0.2 -- --dataset_root DATA
python scripts/sweep.py --gpus 0,1,2,3 --nproc_per_node 2 --grid lr=1e-5,3e-5 -- --dataset_root DATA
    two runs at a time, each in two processes

The options after `--` are main.py's, for all runs. The same command again resumes the sweep.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import OptionParser
from clip_retrieval.errors import UserError, run_with_exit_code


def main() -> None:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.usage = "%(prog)s --values OPTION=VALUE,VALUE ... [options] -- [options of main.py]"
    parser.add_argument(
        "--values",
        "--grid",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTION=VALUES",
        help="values of an option of main.py, separated by commas; all combinations are run. With --random also the "
        "ranges log:LOW:HIGH, uniform:LOW:HIGH and int:LOW:HIGH",
    )
    parser.add_argument(
        "--ablate",
        nargs="+",
        action="extend",
        default=[],
        metavar="CHANGE",
        help="run each combination as it is, and with each of these changes alone: ema=0.999, or several options in "
        'quotes, "trainable=lora lr=1e-4". With seed=1,2,3 among --values the table has means and deviations',
    )
    parser.add_argument("--random", type=int, metavar="N", help="run N random combinations instead of all")
    parser.add_argument("--seed", type=int, default=0, help="seed of --random (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("logs/sweep"), help="folder of the runs, %(default)s")
    parser.add_argument(
        "--gpus", help="run on these GPUs, such as 0,1: one run at a time on each, or on each --nproc_per_node of them"
    )
    parser.add_argument(
        "--nproc_per_node", type=int, default=1, metavar="N", help="processes of each run, started by torchrun"
    )
    parser.add_argument("--sort", default="val_rsum", help="column to sort by (default: %(default)s)")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    if args.random is not None and not 1 <= args.random <= 10_000:
        raise UserError(f"--random {args.random}: must be from 1 to 10,000")

    if args.nproc_per_node < 1:
        raise UserError(f"--nproc_per_node {args.nproc_per_node}: must be at least 1")

    from clip_retrieval.sweep import MAIN, sweep
    from clip_retrieval.sweeping.processes import group_gpus, launch
    from clip_retrieval.sweeping.values import ablate, combine, draw, read_changes, read_values

    if not args.values and not args.ablate:
        raise UserError("no --values and no --ablate: give the option values to compare")
    listed = read_values(args.values)
    runs = combine(listed) if args.random is None else draw(listed, args.random, args.seed)
    runs = ablate(runs, read_changes(args.ablate))
    gpus = group_gpus([gpu for gpu in (args.gpus or "").split(",") if gpu], args.nproc_per_node)
    program = launch(MAIN, args.nproc_per_node)
    sweep(runs, words[end + 1 :], args.output, gpus=gpus, sort=args.sort.replace("_", " "), program=program)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
