"""Convert answers by text to answers by image: X_texts.jsonl to X_texts.tr.jsonl.

python scripts/transform_ir_annotation_to_tr.py --input DATA/test_texts.jsonl

(evaluate_predictions.py reads both.)
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser
from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=())
    parser.add_argument("--input", type=Path, required=True, help="..._texts.jsonl")
    args = parser.parse_args()

    from clip_retrieval.retrieval.predictions import transform_to_tr

    print("wrote", transform_to_tr(args.input))


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
