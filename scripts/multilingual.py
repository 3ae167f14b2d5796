"""Score a model on captions in several languages: a table of recall by language, and the mean.

python scripts/multilingual.py --data xm3600/captions.jsonl --image_dir xm3600/images --resume logs/ex0/best.pt
    XM3600, 36 languages; the files are at google.github.io/crossmodal-3600
python scripts/multilingual.py --data Cross-lingual-Test-Dataset-XTD10 --image_dir COCO --resume logs/ex0/best.pt
    XTD10, 11 languages; the captions are at github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10
python scripts/multilingual.py ... --languages de fr --first_caption
    some languages, and one caption per image

Results are printed, and written to results.json in logs/ex0/xm3600/ or logs/ex0/xtd10/.
"""

import sys

import _path  # noqa: F401

from clip_retrieval.command_line import add_model_arguments, build_parser, take_values
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import ModelOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(ModelOptions,))
    add_model_arguments(parser)
    group = parser.add_argument_group("data of several languages")
    group.add_argument("--data", required=True, help="captions.jsonl of XM3600, or the folder of XTD10's files")
    group.add_argument("--image_dir", required=True, help="folder of the images")
    group.add_argument("--languages", nargs="+", help="languages to score (default: all)")
    group.add_argument(
        "--first_caption", action="store_true", help="only the first caption of an image, as CLIP_benchmark does"
    )
    group.add_argument("--output", help="folder of the results")
    typed = vars(parser.parse_args())
    own = take_values(group, typed, paths=("data", "image_dir", "output"))

    from clip_retrieval.multilingual import score_languages

    score_languages(typed, **own)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
