"""Convert the results.json of an evaluation or a finetune to the formats of other tools.

python scripts/convert_results.py logs/ex0 --format clip_benchmark --output coco.json
python scripts/convert_results.py logs/ex0 --format model_card
python scripts/convert_results.py logs/ex0 --format eval_results --dataset_id ORG/NAME --output .eval_results/coco.yaml
"""

import argparse
import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.errors import run_with_exit_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder of a run, or its results.json")
    parser.add_argument("--format", required=True, choices=("clip_benchmark", "model_card", "eval_results"))
    parser.add_argument("--dataset_id", help="id of the data set on the Hugging Face hub")
    parser.add_argument("--language", default="en", help="of the captions, for clip_benchmark (default: en)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: print)")
    args = parser.parse_args()

    from clip_retrieval.files import write_text
    from clip_retrieval.reporting.convert import convert_results
    from clip_retrieval.reporting.results import read_results

    results = read_results(args.results / "results.json" if args.results.is_dir() else args.results)
    text = convert_results(results, args.format, dataset_id=args.dataset_id, language=args.language)
    if args.output is None:
        print(text, end="")
        return
    write_text(args.output, text)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
