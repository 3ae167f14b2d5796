"""Score a file of predictions: recall at 1, 5 and 10, in percent, and their mean.

python scripts/evaluate_predictions.py DATA/test_texts.jsonl DATA/test_predictions.jsonl output.json
python scripts/evaluate_predictions.py DATA/test_texts.jsonl DATA/test_tr_predictions.jsonl output.json

Predictions may be of either direction, answers by text or by image (.tr.jsonl). If a file is invalid, the output is
{"success": false, "errorMsg": ...} and the exit code is 2.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser
from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=())
    parser.usage = "%(prog)s GOLD PREDICTIONS OUTPUT [options]"
    parser.add_argument("gold", type=Path, help="the answers: ..._texts.jsonl or ..._texts.tr.jsonl")
    parser.add_argument("predictions", type=Path, help="the predictions of make_topk_predictions.py")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--recall_k", type=int, nargs="+", default=[1, 5, 10], help="K of R@K (default: 1 5 10)")
    args = parser.parse_args()

    from clip_retrieval.retrieval.predictions import score_predictions, write_scores

    write_scores(args.output, lambda: score_predictions(args.gold, args.predictions, args.recall_k))
    print(args.output.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
