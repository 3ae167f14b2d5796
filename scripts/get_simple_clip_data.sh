#!/usr/bin/env bash
# Fetch simple-clip's training data into the folders that `--dataset combined`, `textcap` and `sbucaptions` read.
#
#     bash scripts/get_simple_clip_data.sh DATA                    # coco, textcap and sbucaptions
#     bash scripts/get_simple_clip_data.sh DATA textcap            # one of them
#
# Needs a network: PyPI, huggingface.co, and for sbucaptions flickr.com, image by image. On the hub, M3IT's coco and
# textcap and the list of SBU's images are loading scripts, which the datasets library supports only up to version 3. This
# script installs version 3 in its own environment, DATA/fetch, and runs the authors' code there. Later versions read its
# output. The disk needs about 300 GB, half of it for the hub's cache (in HF_HOME).
#
# Many of SBU's million photographs no longer exist; their rows have no image and are skipped when the data are read.
# For yfcc7m, put YFCC100M's images as shards into DATA/yfcc7m: 00000.tar and so on, with a .jpg and a .txt per image, as
# written by img2dataset (github.com/rom1504/img2dataset).
set -euo pipefail
data="${1:?give the folder for the data}"
shift
[ $# -gt 0 ] || set -- coco textcap sbucaptions
for name in "$@"; do
    case "$name" in
        coco | textcap | sbucaptions) ;;
        yfcc7m) echo "yfcc7m: its images are not on the hub; put shards into $data/yfcc7m, as described at the top of this script" >&2; exit 2 ;;
        *) echo "$name: not one of coco, textcap, sbucaptions" >&2; exit 2 ;;
    esac
done
mkdir -p "$data"
if [ -z "${PYTHON:-}" ]; then
    [ -x "$data/fetch/bin/python" ] || python3 -m venv "$data/fetch"
    PYTHON="$data/fetch/bin/python"
    "$PYTHON" -m pip install --quiet 'datasets<4' pillow
fi

m3it() {
    "$PYTHON" - "$1" "$data/$1" <<'PYTHON'
import sys
from datasets import load_dataset

name, folder = sys.argv[1:]
load_dataset("MMInstruction/M3IT", name, trust_remote_code=True).save_to_disk(folder)
PYTHON
}

sbucaptions() {
    "$PYTHON" - "$data/sbu_captions_images" <<'PYTHON'
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

from datasets import Features, Image, Value, load_dataset
from PIL import Image as Pillow


def fetch(url):
    """Fetch an image and shrink its short side to at most 256 pixels; None if it no longer exists."""
    try:
        with urlopen(url, timeout=20) as answer:
            image = Pillow.open(io.BytesIO(answer.read())).convert("RGB")
        image.thumbnail([256 * side // max(256, min(image.size)) for side in image.size])
        file = io.BytesIO()
        image.save(file, "jpeg", quality=95)
        return {"bytes": file.getvalue(), "path": None}
    except Exception:
        return None


def add_images(rows):
    with ThreadPoolExecutor(32) as threads:
        return {"image": list(threads.map(fetch, rows["image_url"])), "caption": rows["caption"]}


links = load_dataset("vicenteor/sbu_captions", split="train", trust_remote_code=True)
columns = Features({"image": Image(), "caption": Value("string")})
if not any(map(fetch, links[:100]["image_url"])):
    sys.exit("none of the first 100 photographs can be fetched; check the network connection")
rows = links.map(add_images, batched=True, batch_size=256, remove_columns=links.column_names, features=columns)
rows.save_to_disk(sys.argv[1])
PYTHON
}

for name in "$@"; do
    case "$name" in
        coco | textcap) m3it "$name" ;;
        sbucaptions) sbucaptions ;;
    esac
done
