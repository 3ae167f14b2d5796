"""Score a model as a zero-shot classifier: top-1, top-5 and top-10 accuracy, overall and per class.

python scripts/zero_shot.py --resume logs/ex0/best.pt --data cifar100 --data_root DIR
    CIFAR-100 from its official archive in DIR (--download fetches it); also cifar10 and stl10
python scripts/zero_shot.py --vision_model ViT-B/32 --data imagenet --data_root DIR
    ImageNet's validation images in folders n01440764, ..., or a variant (-A, -R, -Sketch, V2) in DIR
python scripts/zero_shot.py --resume logs/ex0/best.pt --data FOLDER --class_names names.txt
    a folder with one folder of images per class, and a file of class names
torchrun --nproc_per_node 8 scripts/zero_shot.py ...
    the same on 8 GPUs

Results are printed, and written to results.json and results.txt in logs/ex0/zero_shot_{data}/. The folder's name also
contains the names of given templates and class names.
"""

import sys

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser, take_values
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(ModelOptions,))
    add_arguments(parser, RunOptions, only=("resume", "checkpoint_path", "device"))
    add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision"))
    add_arguments(parser, DataOptions, only=("num_workers", "max_image_pixels"))
    # data, class names and templates
    group = parser.add_argument_group("classification options")
    group.add_argument(
        "--data", required=True, help="cifar10, cifar100, stl10, imagenet, or a folder with one folder per class"
    )
    group.add_argument("--data_root", help="folder of a named data set, or its parent folder (default: datasets)")
    group.add_argument("--download", action="store_true", help="fetch the archive of cifar10, cifar100 or stl10")
    group.add_argument(
        "--class_names",
        help="file of class names: one per line in the order of the folders, lines `folder, name`, or JSON (default: "
        "the data set's names, or those of the folders)",
    )
    group.add_argument(
        "--all_classes",
        action="store_true",
        help="also count classes of --class_names or ImageNet without a folder as candidates",
    )
    group.add_argument(
        "--templates",
        help="prompts: imagenet (80), cifar (18), simple (7), single (1), stl10, chinese, or a file with one per line "
        "(default: the data set's, imagenet's for a folder, chinese for Chinese names)",
    )
    group.add_argument("--template", action="append", help='a template, "a photo of a {}."; may be repeated')
    group.add_argument("--output", help="folder of the results")
    typed = vars(parser.parse_args())
    own = take_values(group, typed, paths=("data_root", "class_names", "output"))
    output = own.pop("output", None)

    from clip_retrieval.classification.labelled_sets import ZeroShotData
    from clip_retrieval.zero_shot import classify

    classify(typed, ZeroShotData(**own), output)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
