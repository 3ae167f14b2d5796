"""Images with captions in several languages, from the published files of XM3600 and XTD10.

- XM3600 (arXiv:2205.12522): `captions.jsonl` with "image/key" and, for each language, {"caption": [...]}; the images
  are {key}.jpg.
- XTD10 (arXiv:2012.05107): `test_image_names.txt` and `test_1kcaptions_{language}.txt`, one caption a line, in the same
  order. The published folders XTD10/, MIC/ (de, fr) and STAIR/ (jp) may be beside each other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import find_image_files
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_text
from clip_retrieval.jsonl import read_records

IMAGE_NAMES, CAPTIONS = "test_image_names.txt", "test_1kcaptions_"
IMAGE_FOLDERS = ("", "images", "train2014", "val2014")  # XTD10's images are COCO's, from both


@dataclass(frozen=True)
class MultilingualData:
    """Images with captions in several languages.

    Attributes:
        dataset: the images and the captions of all languages, without pairs.
        languages: the captions of each language, as a slice, and its pairs, int64 (pairs, 2) of image index and index
            within the slice.
    """

    dataset: RetrievalDataset
    languages: dict[str, tuple[slice, np.ndarray]]


def read_multilingual(
    data: Path, image_dir: Path, languages: Collection[str] = (), *, first_caption: bool = False
) -> MultilingualData:
    """Read the captions of XM3600 or XTD10, told apart by their files.

    Args:
        data: captions.jsonl, or the folder of the published files.
        image_dir: the folder of the images.
        languages: the languages to read (default: all).
        first_caption: read only the first caption of an image in each language.

    Raises UserError, naming the file and line, if files, images or languages are missing or invalid.
    """
    # captions by language: (image index, caption)
    path = data / "captions.jsonl" if data.is_dir() else data
    is_xtd = data.is_dir() and not path.exists()
    names, texts = _read_xtd10(data) if is_xtd else _read_xm3600(path)
    unknown = sorted(set(languages) - set(texts))
    if unknown or not texts:
        found = f"it has {', '.join(texts)}" if texts else "give the published file"
        raise UserError(f"{data}: no captions in {', '.join(unknown) or 'any language'}; {found}")
    # one list of captions
    captions: list[str] = []
    slices: dict[str, tuple[slice, np.ndarray]] = {}
    for language in sorted(languages or texts):
        rows = [(image, text) for image, text in texts[language] if text]
        if first_caption:
            rows = list({image: (image, text) for image, text in reversed(rows)}.values())[::-1]
        if not rows:
            raise UserError(f"{data}: the captions in {language} are empty; give complete files")
        pairs = np.array([(image, number) for number, (image, _) in enumerate(rows)], np.int64)
        slices[language] = slice(len(captions), len(captions) + len(rows)), pairs
        captions += [text for _, text in rows]
    images = find_image_files([(image_dir / folder, names) for folder in IMAGE_FOLDERS], data)
    name = "xtd10" if is_xtd else "xm3600"
    dataset = RetrievalDataset(name, UNSPLIT, images, captions, np.empty((0, 2), np.int64))
    return MultilingualData(dataset, slices)


def _read_xm3600(path: Path) -> tuple[list[str], dict[str, list[tuple[int, str]]]]:
    """Image names, and (image index, caption) by language."""
    names: list[str] = []
    texts: dict[str, list[tuple[int, str]]] = {}
    for line, record in read_records(path):
        key = record.get("image/key")
        if not isinstance(key, str):
            raise UserError(f'{path}, line {line}: no text "image/key"; give XM3600\'s captions.jsonl')
        for language, content in record.items():
            if not isinstance(content, dict) or "caption" not in content:
                continue
            found = content["caption"]
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise UserError(f"{path}, line {line}: {language} has no list of captions; give the published file")
            texts.setdefault(language, []).extend((len(names), clean_caption(text)) for text in found)
        names.append(f"{key}.jpg")
    return names, texts


def _read_xtd10(folder: Path) -> tuple[list[str], dict[str, list[tuple[int, str]]]]:
    """Image names, and (image index, caption) by language."""
    lists = sorted(folder.rglob(IMAGE_NAMES))
    if not lists:
        raise UserError(f"{folder}: holds neither captions.jsonl (XM3600) nor {IMAGE_NAMES} (XTD10)")
    names = _read_lines(lists[0])
    texts = {}
    for path in sorted(folder.rglob(f"{CAPTIONS}*.txt")):
        lines = _read_lines(path)
        if len(lines) != len(names):
            raise UserError(
                f"{path}: has {len(lines):,} captions, {lists[0]} {len(names):,} images; give both complete"
            )
        texts[path.stem.removeprefix(CAPTIONS)] = [(image, clean_caption(text)) for image, text in enumerate(lines)]
    return names, texts


def _read_lines(path: Path) -> list[str]:
    """The lines of a file, which may be blank, without a last one that is empty."""
    lines = read_text(path).rstrip("\r\n").split("\n")
    return [line.rstrip("\r") for line in lines]
