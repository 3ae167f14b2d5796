"""Export a checkpoint for open_clip, transformers, Chinese-CLIP, ONNX or peft, checked numerically.

python scripts/export.py logs/ex0/best.pt OUT --format open_clip
python scripts/export.py logs/ex0/best.pt OUT --format transformers
python scripts/export.py logs/ex0/best.pt clip_cn.pt --format chinese_clip
python scripts/export.py logs/ex0/best.pt OUT --format onnx
python scripts/export.py logs/ex0/last.pt OUT --format peft
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import OptionParser, add_arguments
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import ModelOptions

FORMATS = ("open_clip", "transformers", "chinese_clip", "onnx", "peft")


def main() -> None:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours")
    parser.add_argument(
        "output", type=Path, help="folder to make; for chinese_clip a file, with a model card beside it"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="the system to export to")
    add_arguments(parser, ModelOptions, only=("tokenizer",))
    args = parser.parse_args()
    given = {"tokenizer": args.tokenizer} if getattr(args, "tokenizer", None) else {}
    from clip_retrieval.export.export import export

    difference = export(args.checkpoint, args.output, args.format, **given)
    print(f"wrote {args.output}; its features differ from the checkpoint's by at most {difference:.1g}")


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
