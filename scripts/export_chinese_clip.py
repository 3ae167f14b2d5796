"""Save a checkpoint of a Chinese-CLIP model in Chinese-CLIP's own layout, which its code reads.

python scripts/export_chinese_clip.py logs/ex0/best.pt clip_cn_finetuned.pt
"""

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours")
    parser.add_argument("output", type=Path, help="file to write")
    args = parser.parse_args()
    from clip_retrieval.models.export import export_chinese_clip

    export_chinese_clip(args.checkpoint, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
