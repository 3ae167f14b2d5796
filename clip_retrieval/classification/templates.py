"""Prompt templates: sentences with a placeholder for the class name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from clip_retrieval.data.captions import mend_characters
from clip_retrieval.errors import UserError
from clip_retrieval.files import path_exists, read_text

PLACEHOLDER = "{}"
PLACEHOLDERS = re.compile(r"\{(?:c|label|label_name|class_name)?\}")  # {c} in CLIP_benchmark's files
CODE = re.compile(r"lambda\b|\[|([\"']).*\1,?$")
CHINESE = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
QUALITIES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")

# All but the Chinese set are OpenAI's templates (notebook and data/prompts.md), which published values use.
SETS: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(template(PLACEHOLDER) for template in OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template(PLACEHOLDER) for template in SIMPLE_IMAGENET_TEMPLATES),
    "cifar": tuple(
        template
        for article in ("a", "the")
        for template in (
            *(f"a {quality}photo of {article} {{}}." for quality in QUALITIES),
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
DEFAULT_SETS = {"cifar10": "cifar", "cifar100": "cifar", "stl10": "stl10"}


@dataclass(frozen=True)
class Templates:
    """Templates, each with "{}" as the placeholder of the class name.

    Attributes:
        name: name of the set, path of the file, or "own" for templates from the command line.
        texts: the templates.
    """

    name: str
    texts: tuple[str, ...]

    def prompts(self, class_names: Sequence[str]) -> list[str]:
        """(classes * templates) sentences, class by class."""
        return [text.replace(PLACEHOLDER, name) for name in class_names for text in self.texts]


def choose_templates(
    templates: str | None,
    template: Sequence[str],
    class_names: Sequence[str],
    default: str = "imagenet",
    *,
    option: str = "--templates",
) -> Templates:
    """Choose templates: a set or a file, templates from the command line, or the default set.

    Args:
        templates: name of a set, or path of a text file with one template per line.
        template: the templates themselves.
        class_names: if at least half of them contain Chinese characters, the default is the Chinese set.
        default: default set otherwise.
        option: name of the option for `templates` in messages.

    Raises UserError if both are given, there is no such set or file, or a template has not exactly one placeholder.
    """
    if templates and template:
        raise UserError(f"{option} and --template set the same thing; drop one of them")
    if template:
        return Templates("own", tuple(_parse_template(text, f'--template "{text}"') for text in template))
    if templates and templates not in SETS:
        return _read_templates(templates, option)
    chinese = sum(1 for name in class_names if CHINESE.search(name))
    name = templates or ("chinese" if 2 * chinese >= max(1, len(class_names)) else default)
    return Templates(name, SETS[name])


def _read_templates(file: str, option: str) -> Templates:
    if not path_exists(file):
        raise UserError(f"{option} {file}: no such file, and no set of templates ({', '.join(SETS)})")
    path = Path(file)
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), 1)]
    texts = tuple(_parse_template(line, f"{path}, line {number}") for number, line in lines if line)
    if not texts:
        raise UserError(f"{path}: holds no templates; write one per line, with {{}} for the class name")
    return Templates(str(path), texts)


def _parse_template(text: str, source: str) -> str:
    """The template with "{}" as its placeholder. `source` names it in messages."""
    if CODE.match(text):
        raise UserError(f"{source}: write the sentence alone, without quotes or code")
    count = len(PLACEHOLDERS.findall(text))
    if count != 1:
        raise UserError(f"{source}: has {count} placeholders; write exactly one {{}}, for the class name")
    return PLACEHOLDERS.sub(PLACEHOLDER, mend_characters(text))
