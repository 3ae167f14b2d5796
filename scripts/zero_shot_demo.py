"""Show a model's predictions: the top five labels of each image, printed, and drawn beside the image.

python scripts/zero_shot_demo.py --resume logs/ex0/best.pt --img_path photo.jpg --show_prediction
    demo_output/zero_shot_photo.png
python scripts/zero_shot_demo.py --resume logs/ex0/best.pt --img_dir photos --show_prediction --labels "cat,dog,horse"
    all images of a folder, on several pages if there are many, with your own labels
python scripts/zero_shot_demo.py --vision_model ViT-B/32 --img_dir photos --labels imagenet
    any model, without a figure

As in clip-training, --checkpoint_path is the checkpoint here.
"""

import sys

import _path  # noqa: F401

from clip_retrieval.command_line import add_arguments, build_parser, take_values
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions, RunOptions


def main() -> None:
    parser = build_parser(__doc__.partition("\n")[0], groups=(ModelOptions,))
    parser.add_argument(
        *("--resume", "--ckpt_path", "--checkpoint_path"), dest="resume", help="checkpoint (ours), or weights (others')"
    )
    add_arguments(parser, RunOptions, only=("device",))
    add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision"))
    add_arguments(parser, DataOptions, only=("num_workers", "max_image_pixels"))
    # images, labels and figures
    demo = parser.add_argument_group("demo options")
    demo.add_argument("--img_path", help="an image")
    demo.add_argument("--img_dir", help="a folder of images")
    demo.add_argument(
        *("--show_prediction", "--show_predictions"), action="store_true", help="draw a figure in --output"
    )
    demo.add_argument(
        "--labels",
        help='cifar100, cifar10, stl10, imagenet, a file with a label per line, or "cat,dog,horse" (default: cifar100)',
    )
    demo.add_argument("--templates", help="prompts: a set or a file, as in zero_shot.py")
    demo.add_argument(
        "--template",
        action="append",
        help='a template (default: "a photo of a {}.", or Chinese ones for Chinese labels); may be repeated',
    )
    demo.add_argument(
        "--temperature",
        type=float,
        help="T in softmax(cosine / T) over the labels: 0.01 is a scale of 100 (default: the model's own, "
        "1 / exp(logit_scale))",
    )
    demo.add_argument("--output", help="folder of the figures (default: demo_output)")
    typed = vars(parser.parse_args())
    own = take_values(demo, typed, paths=("img_path", "img_dir", "output"))

    from clip_retrieval.zero_shot_demo import Demo, show

    show(typed, Demo(**own))


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
