"""Score a model as a zero-shot classifier: top-1, top-5 and top-10 accuracy, and each class's.

python scripts/zero_shot.py --resume logs/ex0/best.pt --data cifar100 --data_root DIR
    CIFAR-100 from its official archive in DIR (--download fetches it); also cifar10 and stl10
python scripts/zero_shot.py --vision_model ViT-B/32 --data imagenet --data_root DIR
    ImageNet's validation images in folders n01440764, ..., or a variant (-A, -R, -Sketch, V2) in DIR
python scripts/zero_shot.py --resume logs/ex0/best.pt --data FOLDER --class_names names.txt
    a folder with a folder of images for each class, and what the classes are called
torchrun --nproc_per_node 8 scripts/zero_shot.py ...
    the same on 8 GPUs

Results are printed, and written to logs/ex0/zero_shot_{data}/, results.json and results.txt; templates and class names
that were asked for are in the folder's name as well.
"""

import sys

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser, take_values
from clip_retrieval.errors import run_and_exit
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(ModelOptions,))
    add_arguments(parser, RunOptions, only=("resume", "checkpoint_path", "device"))
    add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision"))
    add_arguments(parser, DataOptions, only=("num_workers", "max_image_pixels"))
    wanted = parser.add_argument_group("classification options")
    wanted.add_argument(
        "--data", required=True, help="cifar10, cifar100, stl10, imagenet, or a folder with a folder for each class"
    )
    wanted.add_argument(
        "--data_root", help="folder of a data set that goes by name, or the one above it (default: datasets)"
    )
    wanted.add_argument("--download", action="store_true", help="fetch the archive of cifar10, cifar100 or stl10")
    wanted.add_argument(
        "--class_names",
        help="file of class names: one per line in the order of the folders, lines `folder, name`, or JSON (default: "
        "the data set's, or those of the folders)",
    )
    wanted.add_argument(
        "--all_classes",
        action="store_true",
        help="classes that --class_names or ImageNet knows are candidates although there is no folder of them",
    )
    wanted.add_argument(
        "--templates",
        help="prompts: imagenet (80), cifar (18), simple (7), single (1), stl10, chinese, or a file with one per line "
        "(default: the data set's, imagenet's for a folder, chinese for Chinese names)",
    )
    wanted.add_argument(
        "--template", action="append", help='a template itself, "a photo of a {}."; may be given several times'
    )
    wanted.add_argument("--output", help="folder of the results")
    typed = vars(parser.parse_args())
    own = take_values(wanted, typed, paths=("data_root", "class_names", "output"))
    output = own.pop("output", None)

    from clip_retrieval.classification.labelled_sets import ZeroShotData
    from clip_retrieval.zero_shot import classify

    classify(typed, ZeroShotData(**own), output)


if __name__ == "__main__":
    sys.exit(run_and_exit(main))
