"""Readers of captions: JSON, CSV, id lists, Chinese-CLIP's files, sizes of shards."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import tokens
from tests.faults.containers import change_base64_lines, change_gzip
from tests.faults.readers.reader import CAPTIONS, Reader, encoded_image, tokenizer, use_splits, write_images
from tests.faults.structures import change_cells, change_json

ROOT = Path(__file__).resolve().parents[3]


def _write_json(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, **options), encoding="utf-8")
    return path


def _coco(first: int = 1) -> dict[str, Any]:
    return {
        "images": [{"id": first + i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [
            {"id": 10 * first + i, "image_id": first + i % 3, "caption": caption} for i, caption in enumerate(CAPTIONS)
        ],
    }


def _make_coco(folder: Path) -> list[Path]:
    write_images(folder, [f"{i}.jpg" for i in range(3)])
    large = _coco(2**40) | {"info": {"year": 2014}, "licenses": []}
    return [_write_json(folder / "own.json", _coco()), _write_json(folder / "large.json", large, indent=1)]


def _read_coco(path: Path) -> None:
    use_splits(("train", "test"), "coco", path.parent, annotations=str(path))


def _make_coco_ids(folder: Path) -> list[Path]:
    names = {}
    ids = {"train": [7, 3, 5], "restval": [21, 20], "dev": [30, 31], "test": [44, 43, 40, 41]}
    images = {"train": 1, "restval": 2, "dev": 3, "test": 4}
    for year_folder, lists in (("train2014", ["train"]), ("val2014", ["restval", "dev", "test"])):
        content: dict[str, Any] = {"images": [], "annotations": []}
        for name in lists:
            names[name] = f"COCO_{year_folder}_{images[name]:012d}.jpg"
            content["images"].append({"id": images[name], "file_name": names[name]})
            content["annotations"] += [
                {"id": i, "image_id": images[name], "caption": f"caption {i}"} for i in ids[name]
            ]
        _write_json(folder / "annotations" / f"captions_{year_folder}.json", content)
    write_images(folder / "images", list(names.values()))
    paths = []
    for name, values in ids.items():
        paths.append(folder / "annotations" / f"coco_{name}_ids.npy")
        np.save(paths[-1], np.array(values, np.int64 if name == "train" else np.int32))
    return paths


def _read_coco_ids(path: Path) -> None:
    use_splits(("train", "val", "test"), "coco", path.parent.parent)


def _karpathy() -> dict[str, Any]:
    splits = ("train", "restval", "val", "test")
    images = []
    for number, split in enumerate(splits):
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in CAPTIONS[: number + 1]]
        images.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences, "imgid": number})
    images[2]["filepath"] = "val"
    return {"images": images, "dataset": "own"}


def _make_karpathy(folder: Path) -> list[Path]:
    write_images(folder / "images", ["0.jpg", "1.jpg", "val/2.jpg", "3.jpg"])
    return [_write_json(folder / "dataset_own.json", _karpathy())]


def _make_karpathy_gz(folder: Path) -> list[Path]:
    write_images(folder / "images", ["0.jpg", "1.jpg", "val/2.jpg", "3.jpg"])
    path = folder / "dataset_own.json.gz"
    path.write_bytes(gzip.compress(json.dumps(_karpathy()).encode()))
    return [path]


def _read_karpathy(path: Path) -> None:
    use_splits(("train", "val", "test"), "karpathy", path.parent, annotations=str(path))


def _make_flickr(folder: Path) -> list[Path]:
    lists = [ROOT / "datasets" / "annotations" / f"flickr8k_{split}.txt" for split in ("train", "test")]
    names = [path.read_text().split()[0] for path in lists]
    write_images(folder / "Images", names)
    lines = {
        "results.csv": [
            "image_name| comment_number| comment",
            *(f"{name}| {i}| a dog" for name in names for i in (0, 1)),
        ],
        "captions.txt": ["image,caption", *(f'{name},"a dog, a cat"' for name in names)],
        "Flickr8k.token.txt": [f"{name}#{i}\ta dog runs" for name in names for i in (0, 1)],
    }
    for name, text in lines.items():
        (folder / name).write_text("\n".join(text) + "\n")
    return [folder / name for name in lines]


def _read_flickr(path: Path) -> None:
    use_splits(("train", "test"), "flickr8k", path.parent, annotations=str(path))


def _make_csv(folder: Path) -> list[Path]:
    write_images(folder, [f"{i}.jpg" for i in range(3)])
    texts = {
        "splits.csv": 'image,caption,split\n0.jpg,a thing,train\n1.jpg,"two, three",val\n2.jpg,ein Hündchen,test\n',
        "plain.csv": "image;caption\r\n0.jpg;a thing\r\n1.jpg;another thing\r\n./0.jpg;a third\r\n",
        "table.tsv": "caption\timage\na thing\t0.jpg\n红色的包\t1.jpg\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    (folder / "packed.csv.gz").write_bytes(gzip.compress(texts["splits.csv"].encode()))
    return [folder / name for name in texts]


def _make_csv_gz(folder: Path) -> list[Path]:
    _make_csv(folder)
    return [folder / "packed.csv.gz"]


def _read_csv(path: Path) -> None:
    use_splits(("train", "val", "test"), "csv", path.parent, annotations=str(path))


def _make_chinese(folder: Path) -> None:
    images = [b"%d\t%s\n" % (i, base64.b64encode(encoded_image(i))) for i in range(3)]
    (folder / "test_imgs.tsv").write_bytes(b"".join(images))
    texts = [{"text_id": i, "text": text, "image_ids": [i % 3]} for i, text in enumerate(CAPTIONS)]
    texts.append({"text_id": 99, "text": "没有", "image_ids": []})
    lines = [json.dumps(text, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (folder / "test_texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_chinese_texts(folder: Path) -> list[Path]:
    _make_chinese(folder)
    return [folder / "test_texts.jsonl"]


def _make_chinese_images(folder: Path) -> list[Path]:
    _make_chinese(folder)
    return [folder / "test_imgs.tsv"]


def _read_chinese(path: Path) -> None:
    use_splits(("test",), "chinese", path.parent)


def _make_classes(folder: Path, names: dict[str, str]) -> list[Path]:
    write_images(folder / "images", ["n01440764/0.jpg", "n01443537/1.jpg", "n01484850/2.jpg"])
    for name, text in names.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in names]


def _make_class_texts(folder: Path) -> list[Path]:
    lists = "tench\ngoldfish\ngreat white shark\n"
    mapped = "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n"
    tabs = "n01440764\t1 tench\nn01443537\t2 goldfish\nn01484850\t3 great white shark\n"
    return _make_classes(folder, {"list.txt": lists, "mapped.txt": mapped, "tabs.txt": tabs})


def _make_class_tables(folder: Path) -> list[Path]:
    plain = 'folder,name\nn01440764,tench\nn01443537,"goldfish, gold"\nn01484850,shark\n'
    wide = "id;n;name;words\n1;n01440764;tench;a\n2;n01443537;goldfish;b\n3;n01484850;shark;c\n"
    return _make_classes(folder, {"plain.csv": plain, "wide.csv": wide})


def _make_class_json(folder: Path) -> list[Path]:
    index = {str(i): [name, f"name {i}"] for i, name in enumerate(("n01440764", "n01443537", "n01484850"))}
    contents = {"list.json": ["tench", "goldfish", "shark"], "index.json": index, "object.json": dict(index.values())}
    return _make_classes(folder, {name: json.dumps(content) for name, content in contents.items()})


def _read_classes(path: Path) -> None:
    from clip_retrieval.classification.labelled_sets import ZeroShotData, read_labelled

    labelled, templates = read_labelled(ZeroShotData(str(path.parent / "images"), path.parent, class_names=path))
    use_classes(labelled.class_names, templates.texts)


def _make_templates(folder: Path) -> list[Path]:
    write_images(folder / "images", ["dog/0.jpg", "cat/1.jpg"])
    (folder / "templates.txt").write_text("a photo of a {}.\nein Bild: {}\n\nthe {c} in snow\n", encoding="utf-8")
    return [folder / "templates.txt"]


def _read_templates(path: Path) -> None:
    from clip_retrieval.classification.labelled_sets import ZeroShotData, read_labelled

    labelled, templates = read_labelled(ZeroShotData(str(path.parent / "images"), path.parent, templates=str(path)))
    use_classes(labelled.class_names, templates.texts)


def use_classes(names: Sequence[str], templates: Sequence[str]) -> None:
    """Tokenize the prompts of the classes."""
    from clip_retrieval.data.captions import tokenize

    tokenize([template.replace("{}", name) for name in names for template in templates], tokenizer())


def _make_sizes(folder: Path) -> list[Path]:
    for number in range(3):
        (folder / f"{number}.tar").write_bytes(bytes(1 << 16))
    return [_write_json(folder / "sizes.json", {"0.tar": 3, "1.tar": "12", "2.tar": 0})]


def _read_sizes(path: Path) -> None:
    from clip_retrieval.data.shards.order import ShardOrder, Shards
    from clip_retrieval.data.shards.sizes import known_sizes

    paths = [path.parent / f"{i}.tar" for i in range(3)]
    sizes = known_sizes(paths)
    if None not in sizes and sum(sizes) >= 2:
        order = ShardOrder(Shards(paths, sizes), 2, num_samples=None, shuffle_buffer=4, seed=0)
        next(iter(order.lane(0, 0, 0)))


def _make_archives(folder: Path) -> list[Path]:
    (folder / "cifar-10-python.tar.gz").write_bytes(gzip.compress(b"\0" * 10240))
    return [folder / "cifar-10-python.tar.gz"]


def _read_archive(path: Path) -> None:
    from clip_retrieval.classification.archives import read_archive

    read_archive("cifar10", path.parent)


DATA = (
    Reader("coco captions", _make_coco, _read_coco, tokens.JSON, (change_json,)),
    Reader("coco ids", _make_coco_ids, _read_coco_ids, tokens.NPY),
    Reader("karpathy json", _make_karpathy, _read_karpathy, tokens.JSON, (change_json,)),
    Reader("karpathy json.gz", _make_karpathy_gz, _read_karpathy, tokens.JSON, (change_gzip,)),
    Reader("flickr captions", _make_flickr, _read_flickr, tokens.CSV, (change_cells,)),
    Reader("csv", _make_csv, _read_csv, tokens.CSV, (change_cells,)),
    Reader("csv.gz", _make_csv_gz, _read_csv, tokens.CSV, (change_gzip,)),
    Reader("chinese texts", _make_chinese_texts, _read_chinese, tokens.JSON, (change_json,)),
    Reader("chinese images", _make_chinese_images, _read_chinese, tokens.JPEG, (change_base64_lines,)),
    Reader("class names txt", _make_class_texts, _read_classes, tokens.LINES),
    Reader("class names csv", _make_class_tables, _read_classes, tokens.CSV, (change_cells,)),
    Reader("class names json", _make_class_json, _read_classes, tokens.JSON, (change_json,)),
    Reader("templates", _make_templates, _read_templates, tokens.LINES),
    Reader("shard sizes", _make_sizes, _read_sizes, tokens.JSON, (change_json,)),
    Reader("cifar archive", _make_archives, _read_archive, tokens.ZIP, accepts=False),
)
