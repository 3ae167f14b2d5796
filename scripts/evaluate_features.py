"""Score the embeddings of any system: exact recall and ranks of the inner products of two .npy files.

python scripts/evaluate_features.py --image_features A.npy --text_features B.npy --text_to_image M.npy \
    --normalize --results out.json

M holds the image row of each text. If a text has several images, give --pairs P.npy with rows (text row, image row).
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser
from clip_retrieval.errors import UserError, run_with_exit_code


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=())
    parser.add_argument("--image_features", type=Path, required=True, help=".npy of floats (images, dimensions)")
    parser.add_argument("--text_features", type=Path, required=True, help=".npy of floats (texts, dimensions)")
    parser.add_argument("--text_to_image", type=Path, help=".npy of integers (texts,): each text's image row")
    parser.add_argument("--pairs", type=Path, help=".npy of integers (pairs, 2): text row, image row; takes precedence")
    parser.add_argument("--normalize", action="store_true", help="divide each feature by its length, in float64")
    parser.add_argument("--recall_k", type=int, nargs="+", help="further K for R@K, besides 1, 5 and 10")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best available)")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    typed = vars(parser.parse_args())

    from clip_retrieval.files import write_json
    from clip_retrieval.reporting.table import results_table
    from clip_retrieval.retrieval.evaluate_features import evaluate_feature_files

    path = typed.pop("results")
    if path.is_dir():
        raise UserError(f"--results {path}: a folder; give the name of a file")
    results = evaluate_feature_files(**typed)
    write_json(path, results)
    print(results_table({"": results}), f"written to {path}", sep="\n")


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
