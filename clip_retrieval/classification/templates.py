"""Prompt templates: sentences with a place for the name of a class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from clip_retrieval.data.captions import mend_characters
from clip_retrieval.errors import UserError
from clip_retrieval.files import path_exists, read_text

PLACE = "{}"
PLACES = re.compile(r"\{(?:c|label|label_name|class_name)?\}")  # CLIP_benchmark's files write {c}, others a name
CODE = re.compile(r"lambda\b|\[|([\"']).*\1,?$")
CHINESE = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
LOOKS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")

# All but the Chinese are OpenAI's, by which published values are made (its notebook and data/prompts.md).
SETS: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(template(PLACE) for template in OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template(PLACE) for template in SIMPLE_IMAGENET_TEMPLATES),
    "cifar": tuple(
        template
        for article in ("a", "the")
        for template in (
            *(f"a {look}photo of {article} {{}}." for look in LOOKS),
            *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
        )
    ),
    "single": ("a photo of a {}.",),
    "stl10": ("a photo of a {}.", "a photo of the {}."),
    "chinese": (
        "一张{}的照片。",
        "一张{}的图片。",
        "照片里有{}。",
        "一张清晰的{}照片。",
        "一张模糊的{}照片。",
        "一张{}的特写照片。",
        "一张小小的{}的照片。",
        "一张巨大的{}的照片。",
    ),
}
OF_DATA = {"cifar10": "cifar", "cifar100": "cifar", "stl10": "stl10"}


@dataclass(frozen=True)
class Templates:
    """Templates, each with "{}" where the name of a class goes.

    Attributes:
        name: the set, the file, or "own" for templates that were typed.
        texts: the templates.
    """

    name: str
    texts: tuple[str, ...]

    def prompts(self, class_names: Sequence[str]) -> list[str]:
        """(classes * templates) sentences, those of a class one after the other."""
        return [text.replace(PLACE, name) for name in class_names for text in self.texts]


def choose_templates(
    asked: str | None,
    typed: Sequence[str],
    class_names: Sequence[str],
    usual: str = "imagenet",
    *,
    option: str = "--templates",
) -> Templates:
    """The templates that were asked for: a set or a file, or some that were typed; else the usual ones.

    Args:
        asked: name of a set, or path of a text file with a template per line.
        typed: templates themselves.
        class_names: where most names are in Chinese characters, the Chinese set is the usual one.
        usual: the usual set otherwise.
        option: what messages call the option for `asked`.

    Raises:
        UserError: both are given, no such set or file, or a template has not exactly one place for the name.
    """
    if asked and typed:
        raise UserError(f"{option} and --template both say what is asked; drop one of them")
    if typed:
        return Templates("own", tuple(_checked(text, f'--template "{text}"') for text in typed))
    if asked and asked not in SETS:
        return _from_file(asked, option)
    chinese = sum(1 for name in class_names if CHINESE.search(name))
    name = asked or ("chinese" if 2 * chinese >= max(1, len(class_names)) else usual)
    return Templates(name, SETS[name])


def _from_file(asked: str, option: str) -> Templates:
    if not path_exists(asked):
        raise UserError(f"{option} {asked}: no such file, and no set of templates ({', '.join(SETS)})")
    path = Path(asked)
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), 1)]
    texts = tuple(_checked(line, f"{path}, line {number}") for number, line in lines if line)
    if not texts:
        raise UserError(f"{path}: holds no templates; write one per line, with {{}} for the name of the class")
    return Templates(str(path), texts)


def _checked(text: str, where: str) -> str:
    """The template with "{}" as its place."""
    if CODE.match(text):
        raise UserError(f"{where}: write the sentence alone, without quotes or code")
    places = len(PLACES.findall(text))
    if places != 1:
        raise UserError(
            f"{where}: a template has exactly one {{}}, where the name of the class goes; this has {places}"
        )
    return PLACES.sub(PLACE, mend_characters(text))
