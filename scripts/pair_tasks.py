"""Score a model on tasks of two captions or images that differ in a word or its place: Winoground, SugarCrepe, ARO.

python scripts/pair_tasks.py --task winoground --data winoground --image_dir winoground/images --vision_model ViT-B/32
    text, image and group score; examples.jsonl and images.zip are at huggingface.co/datasets/facebook/winoground
python scripts/pair_tasks.py --task sugarcrepe --data sugar-crepe/data --image_dir val2017 --resume logs/ex0/best.pt
    accuracy of each category and their mean; the files are at github.com/RAIVNLab/sugar-crepe
python scripts/pair_tasks.py --task aro --data ARO --image_dir ARO/images --resume logs/ex0/best.pt
    VG-Relation and VG-Attribution; the files are at github.com/mertyg/vision-language-models-are-bows

Results are printed, and written to results.json in logs/ex0/{task}/.
"""

import sys

import _path  # noqa: F401

from clip_retrieval.command_line import add_model_arguments, build_parser, take_values
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import ModelOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(ModelOptions,))
    add_model_arguments(parser)
    group = parser.add_argument_group("task options")
    group.add_argument("--task", required=True, choices=("winoground", "sugarcrepe", "aro"), help="the task")
    group.add_argument("--data", required=True, help="the published file of examples, or the folder of the files")
    group.add_argument("--image_dir", required=True, help="folder of the images")
    group.add_argument("--output", help="folder of the results")
    typed = vars(parser.parse_args())
    own = take_values(group, typed, paths=("data", "image_dir", "output"))

    from clip_retrieval.pair_tasks import score_pair_tasks

    score_pair_tasks(typed, **own)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
