"""Model names and how they are resolved."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from clip_retrieval.errors import UserError

OPENAI_NAMES = {
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
"""OpenAI's names, and open_clip's for the same architectures."""

ALIASES = {"efficientnet": "efficientnet_v2_s"}
"""simple-clip's names, and ours for the same models."""

HUB = "hf-hub:"
FOLDER = "local-dir:"
OWN_WEIGHTS = "own"
NO_WEIGHTS = "none"
UNNAMED = "Chinese-CLIP"
"""Name of a Chinese-CLIP model that only its weight file describes."""


@dataclass(frozen=True)
class ModelName:
    """A resolved model name.

    Attributes:
        name: the canonical name: OpenAI's spelling if there is one.
        config: name of the config file in open_clip or in configs/, an `hf-hub:` or `local-dir:` id, or the path of a
            .json.
        kind: location of the config: "open_clip", "ours", "hub", "folder" or "file".
        openai_spelling: whether the user typed a spelling that only OpenAI uses (`ViT-B/32`, `RN50`). Ignored when
            names are compared.
    """

    name: str
    config: str
    kind: str
    openai_spelling: bool = field(default=False, compare=False)

    @property
    def default_weights(self) -> str:
        """Default of --pretrained: "openai", "own" (the weights of a hub id or folder) or "none"."""
        if self.kind in ("hub", "folder"):
            return OWN_WEIGHTS
        return "openai" if self.name in OPENAI_NAMES else NO_WEIGHTS


def resolve(name: str) -> ModelName:
    """Resolve a model name. Raises UserError, with the nearest known names, if it is unknown."""
    name = ALIASES.get(name, name)
    if name in OPENAI_NAMES:
        return ModelName(name, OPENAI_NAMES[name], "open_clip", openai_spelling=True)
    for prefix, kind in ((HUB, "hub"), (FOLDER, "folder")):
        if name.startswith(prefix):
            if name == prefix:
                raise UserError(f"--vision_model {name}: nothing follows the colon; give an id or a path after it")
            return ModelName(name, name, kind)
    if name in our_configs():
        return ModelName(name, name, "ours")
    if name.endswith(".json"):
        return ModelName(name, name, "file")
    # OpenAI's slash is accepted for any model (ViT-H/14).
    config = name.replace("/", "-")
    if config in open_clip_names():
        canonical = next((openai for openai, other in OPENAI_NAMES.items() if other == config), config)
        return ModelName(canonical, config, "open_clip")
    near = nearest(name, [*OPENAI_NAMES, *our_configs(), *open_clip_names()])
    if Path(name).is_dir():
        near = f" (did you mean {FOLDER}{name}?)"
    elif name.count("/") == 1:
        near = f"{near.removesuffix('?)')} or {HUB}{name}?)" if near else f" (did you mean {HUB}{name}?)"
    raise UserError(
        f"--vision_model {name}: no such model{near}; give an OpenAI or open_clip name, hf-hub:ORG/NAME, "
        "local-dir:PATH, or a model config .json"
    )


def canonical(name: str) -> str:
    """Return the canonical spelling of a model name; an unknown name as it is."""
    try:
        return resolve(name).name
    except UserError:
        return name


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ` (did you mean A, B?)` with the names in `known` that are similar to `name`, or an empty string."""
    by_lower = {k.lower(): k for k in reversed(known)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(by_lower[n] for n in near)}?)" if near else ""


@cache
def our_configs() -> dict[str, Path]:
    """Return the files of our own model configs by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


@cache
def open_clip_names() -> tuple[str, ...]:
    """Return the names of open_clip's model configs, without importing open_clip: that would load torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return ()
    return tuple(sorted(path.stem for path in (Path(package.origin).parent / "model_configs").glob("*.json")))
