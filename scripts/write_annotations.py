"""Write datasets/annotations: the split id lists of COCO, Flickr8K and Flickr30K (ids and file names, no captions).

    python scripts/write_annotations.py DATA

DATA holds coco_ids/coco_{train,dev,test,restval}_ids.npy (from CLIP_ITM), and Karpathy's flickr8k/dataset_flickr8k.json
and flickr30k_text/dataset_flickr30k.json.gz. The default is $CLIP_RETRIEVAL_DATA.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _path  # noqa: F401
import numpy as np

from clip_retrieval.data.readers.annotations import read_ids
from clip_retrieval.data.readers.karpathy import read_karpathy_json
from clip_retrieval.errors import UserError, run_with_exit_code
from clip_retrieval.files import write_text

ANNOTATIONS = Path(__file__).resolve().parents[1] / "datasets" / "annotations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path, default=os.environ.get("CLIP_RETRIEVAL_DATA"))
    parser.add_argument("--output", type=Path, default=ANNOTATIONS, help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not args.data or not Path(args.data).is_dir():
        raise UserError(f"{args.data}: no such folder; give the folder, or set CLIP_RETRIEVAL_DATA")
    args.output.mkdir(parents=True, exist_ok=True)
    write_coco(Path(args.data) / "coco_ids", args.output)
    write_flickr("flickr8k", Path(args.data) / "flickr8k" / "dataset_flickr8k.json", args.output)
    write_flickr("flickr30k", Path(args.data) / "flickr30k_text" / "dataset_flickr30k.json.gz", args.output)


def write_coco(folder: Path, output: Path) -> None:
    """Write caption ids, in their order, as int32."""
    for split in ("train", "dev", "test", "restval"):
        ids = read_ids(folder / f"coco_{split}_ids.npy")
        np.save(output / f"coco_{split}_ids.npy", ids.astype(np.int32))
        print(f"coco {split}: {len(ids):,} captions")


def write_flickr(name: str, source: Path, output: Path) -> None:
    """Write image file names, one per line, in the order of Karpathy's file."""
    splits = read_karpathy_json(source)
    for split in ("train", "val", "test"):
        names = [image.name for image in splits.get(split, ())]
        write_text(output / f"{name}_{split}.txt", "".join(f"{n}\n" for n in names))
        print(f"{name} {split}: {len(names):,} images")


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
