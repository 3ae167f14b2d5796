"""The model config and the preprocessing that belong to a model's name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip import factory
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from clip_retrieval.errors import UserError
from clip_retrieval.models import hub, names
from clip_retrieval.models.names import ModelName


def read_config(name: ModelName) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model config and preprocessing (as `preprocess_config` gives it) of a name.

    Raises UserError where it names no model config, or one that cannot be had.
    """
    if name.kind == "open_clip":
        return factory.get_model_config(name.config), _common_preprocess(name.config)
    if name.kind == "hub":
        content = hub.fetch_hub_config(name.config.removeprefix(names.HUB))
    elif name.kind == "folder":
        content = _read_json(Path(name.config.removeprefix(names.FOLDER)) / "open_clip_config.json")
    else:
        content = _read_json(names.our_configs()[name.config] if name.kind == "ours" else Path(name.config))
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if lacking := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise UserError(f"--vision_model {name.name} is not a model config: it has no {', '.join(lacking)}")
    overrides = content.get("preprocess_cfg", {})
    if wrong := _wrong_values(config, overrides):
        raise UserError(f"--vision_model {name.name} is not a model config: {wrong}")
    return config, preprocess_config(overrides)


def _wrong_values(config: dict[str, Any], preprocess: Any) -> str:
    """What is wrong with the values that nothing else would complain of before a run breaks on them."""
    size = config["vision_cfg"].get("image_size", 1)
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and side > 0 for side in sides):
        return f"its image_size is {json.dumps(size)}, no whole number"
    if not isinstance(config["text_cfg"].get("hf_config", {}), dict):
        return "its hf_config holds no values"
    if not isinstance(preprocess, dict):
        return "its preprocess_cfg holds no values"
    for key in ("mean", "std"):
        value = preprocess.get(key, [0, 0, 0])
        if not isinstance(value, list) or [type(v) in (int, float) for v in value] != [True] * 3:
            return f"its {key} is {json.dumps(value)}, not three numbers"
    return ""


def preprocess_config(overrides: dict[str, Any]) -> dict[str, Any]:
    """open_clip's PreprocessCfg as plain JSON, with `overrides` (other keys of theirs are left out)."""
    return json.loads(json.dumps(merge_preprocess_dict(asdict(PreprocessCfg()), overrides)))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such model config") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a model config: {error}") from None


def _common_preprocess(config_name: str) -> dict[str, Any]:
    """The preprocessing of all of a model's tags, where they agree (SigLIP's do), else OpenAI's."""
    tags = list_pretrained_tags_by_model(config_name)
    of_tags = [preprocess_config(get_pretrained_cfg(config_name, tag)) for tag in tags]
    return of_tags[0] if of_tags and all(p == of_tags[0] for p in of_tags) else preprocess_config({})
