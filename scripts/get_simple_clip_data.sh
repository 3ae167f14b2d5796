#!/usr/bin/env bash
# Fetch the data sets that simple-clip trains on, to where `--dataset combined`, `textcap` and `sbucaptions` find them.
#
#     bash scripts/get_simple_clip_data.sh DATA                    # coco, textcap and sbucaptions
#     bash scripts/get_simple_clip_data.sh DATA textcap            # one of them
#
# All of it needs a network: PyPI, huggingface.co, and for sbucaptions flickr.com, image by image. M3IT's coco and textcap
# and the list of SBU's images are on the hub as loading scripts, which the library datasets runs up to version 3 only:
# that one goes into an environment of its own, DATA/fetch, and runs what their authors put there. What it writes, later
# versions read. Take a disk with some 300 GB free, half of it for the hub's cache (HF_HOME says where).
#
# Of SBU's million photographs many are gone; their rows stay without an image, and are left out when they are read.
# For yfcc7m bring YFCC100M's images as shards in DATA/yfcc7m, 00000.tar and so on with a .jpg and a .txt for each image,
# as img2dataset writes them (github.com/rom1504/img2dataset).
set -euo pipefail
data="${1:?give the folder for the data}"
shift
[ $# -gt 0 ] || set -- coco textcap sbucaptions
for name in "$@"; do
    case "$name" in
        coco | textcap | sbucaptions) ;;
        yfcc7m) echo "yfcc7m: its images are not on the hub; bring them as shards in $data/yfcc7m, as the top of this script says" >&2; exit 2 ;;
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


def fetched(url):
    """The bytes of an image, its short side at most 256 pixels; None where there is none any more."""
    try:
        with urlopen(url, timeout=20) as answer:
            image = Pillow.open(io.BytesIO(answer.read())).convert("RGB")
        image.thumbnail([256 * side // max(256, min(image.size)) for side in image.size])
        file = io.BytesIO()
        image.save(file, "jpeg", quality=95)
        return {"bytes": file.getvalue(), "path": None}
    except Exception:
        return None


def with_images(rows):
    with ThreadPoolExecutor(32) as threads:
        return {"image": list(threads.map(fetched, rows["image_url"])), "caption": rows["caption"]}


links = load_dataset("vicenteor/sbu_captions", split="train", trust_remote_code=True)
columns = Features({"image": Image(), "caption": Value("string")})
if not any(map(fetched, links[:100]["image_url"])):
    sys.exit("none of the first 100 photographs can be fetched; is there a network?")
rows = links.map(with_images, batched=True, batch_size=256, remove_columns=links.column_names, features=columns)
rows.save_to_disk(sys.argv[1])
PYTHON
}

for name in "$@"; do
    case "$name" in
        coco | textcap) m3it "$name" ;;
        sbucaptions) sbucaptions ;;
    esac
done
