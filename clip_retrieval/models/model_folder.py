"""Folders that hold a whole model: open_clip's, transformers' and sentence-transformers', here or on the hub."""

from __future__ import annotations

from pathlib import Path

from open_clip import factory
from open_clip.pretrained import download_pretrained_from_hf

from clip_retrieval.errors import UserError
from clip_retrieval.models import hub
from clip_retrieval.models.foreign import find_folder_problem
from clip_retrieval.models.hugging_face import read_model_json
from clip_retrieval.models.libraries import quiet
from clip_retrieval.models.names import FOLDER, HUB, ModelName

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
INDEX = ".index.json"
"""End of the name of a file that lists the shards of a weight file."""

WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")


def find_folder(name: ModelName) -> Path:
    """Return the folder with the config of a `local-dir:` or `hf-hub:` model; the files of a hub model are fetched.

    Raises UserError if there is no such folder, or it holds no model.
    """
    place = name.config.partition(":")[2]
    if name.kind == "folder":
        if not Path(place).is_dir():
            raise UserError(f"{name.config}: no such folder; give the folder of a model")
        return _find_config_folder(Path(place), place)
    failure = (
        f"open_clip_config.json or config.json of {name.config} could not be fetched from huggingface.co; check the "
        "name and the network, or download the repository elsewhere and give its folder as --vision_model "
        "local-dir:PATH"
    )
    if config := hub.fetch_if_exists(place, OPEN_CLIP_CONFIG):
        return Path(config).parent
    return _find_config_folder(Path(hub.fetch_small_files(place, failure)), name.config)


def holds_open_clip(folder: Path) -> bool:
    """Whether a folder holds open_clip's model."""
    return (folder / OPEN_CLIP_CONFIG).exists()


def find_weights(name: ModelName) -> str:
    """Return the path of the weights, or of the index of their shards, of a `local-dir:` or `hf-hub:` model.

    Raises UserError if there are none.
    """
    folder, place = find_folder(name), name.config.partition(":")[2]
    problem = find_folder_problem(folder)
    if name.kind == "hub":
        failure = (
            f"the weights of {name.config} could not be fetched from huggingface.co; check the network, or download "
            "them elsewhere and give them as --pretrained FILE"
        )
        if problem:
            failure = f"{name.config} {problem}"
        if holds_open_clip(folder):
            return hub.fetch(failure, lambda: download_pretrained_from_hf(place))
        return _fetch_weights(place, folder, failure)
    if holds_open_clip(folder):
        with quiet():
            path = factory._find_checkpoint_in_dir(folder)
    else:
        path = next((str(folder / file) for file in WEIGHTS if (folder / file).exists()), None)
    if path is None:
        problem = problem or "holds no weights; give them as --pretrained FILE, or --pretrained none"
        raise UserError(f"{name.config} {problem}")
    return path


def read_shard_names(index: Path) -> list[Path]:
    """Return the files that an index of shards lists. Raises UserError if it is damaged or names other folders."""
    content = read_model_json(index, "index of weight files")
    shards = content.get("weight_map") if isinstance(content, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(file, str) and Path(file).name == file for file in names):
        raise UserError(f"{index} is not an index of weight files; fetch it again")
    return [index.parent / file for file in dict.fromkeys(names)]


def as_folder_name(place: str) -> str | None:
    """Return `local-dir:PLACE` for a folder, or a name with a prefix as it is; None for anything else."""
    if place.startswith((HUB, FOLDER)):
        return place
    return f"{FOLDER}{place}" if Path(place).is_dir() else None


def _find_config_folder(folder: Path, name: str) -> Path:
    """Return the folder itself or, as sentence-transformers saves a model, its only subfolder with a config of a CLIP.

    Raises UserError, with `name`, if none has a config.
    """
    if holds_open_clip(folder) or (folder / TRANSFORMERS_CONFIG).exists():
        return folder
    configs = {path.parent: path for path in sorted(folder.glob(f"*/{TRANSFORMERS_CONFIG}"))}
    found = [place for place, path in configs.items() if _has_model_type(path)]
    if len(found) != 1:
        if problem := find_folder_problem(folder):
            raise UserError(f"{name} {problem}")
        several = f" (there are {', '.join(path.name for path in found)})" if found else ""
        raise UserError(
            f"{name} holds no {OPEN_CLIP_CONFIG} and no {TRANSFORMERS_CONFIG} of a CLIP{several}; give the folder of "
            "a model"
        )
    return found[0]


def _has_model_type(path: Path) -> bool:
    content = read_model_json(path, "config")
    return isinstance(content, dict) and "model_type" in content


def _fetch_weights(repository: str, folder: Path, failure: str) -> str:
    """Fetch the weights of a hub model of transformers into its cached folder."""
    prefix = "" if folder.parent.name == "snapshots" else f"{folder.name}/"  # .../snapshots/COMMIT[/0_CLIPModel]
    path = hub.fetch_files(repository, [f"{prefix}{file}" for file in WEIGHTS], failure)
    if path.endswith(INDEX):
        for shard in read_shard_names(Path(path)):
            hub.fetch_files(repository, [f"{prefix}{shard.name}"], failure)
    return path
