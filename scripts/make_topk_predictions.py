"""Write the exact top images of each text, best first, one line each: {"text_id": ..., "image_ids": [...]}.

python scripts/make_topk_predictions.py --image-feats DATA/test_imgs.img_feat.jsonl \
    --text-feats DATA/test_texts.txt_feat.jsonl --top-k 10 --output DATA/test_predictions.jsonl

Features are JSON lines or .npy, as written by extract_features.py. --tr_output also writes the top texts of each image,
computed in the same pass.
"""

import sys
from pathlib import Path

import _path  # noqa: F401

from clip_retrieval.command_line import build_parser
from clip_retrieval.errors import run_with_exit_code


def main(description: str = __doc__, direction: str = "t2i") -> None:
    parser = build_parser(description.partition("\n")[0].replace("%", "%%"), groups=())
    parser.add_argument("--image_feats", type=Path, required=True, help="image features, .jsonl or .npy")
    parser.add_argument("--text_feats", type=Path, required=True, help="text features, .jsonl or .npy")
    parser.add_argument("--top_k", type=int, default=10, help="items for each query (default: 10)")
    parser.add_argument("--eval_batch_size", type=int, help="maximum items scored at a time, to limit memory")
    parser.add_argument(
        "--index",
        choices=("exact", "faiss"),
        default="exact",
        help="faiss: approximate, for large galleries",
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best available)")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    if direction == "t2i":
        parser.add_argument("--tr_output", type=Path, help="JSON lines to write with the texts of each image")
    typed = vars(parser.parse_args())

    from clip_retrieval.retrieval.predictions import predict

    outputs = {direction: typed.pop("output")}
    if "tr_output" in typed:
        outputs["i2t"] = typed.pop("tr_output")
    predict(gallery_batch_size=typed.pop("eval_batch_size", None), outputs=outputs, **typed)
    print("wrote", *outputs.values())


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
