"""Data sets of the Hugging Face Hub: a downloaded folder by its README's metadata, or a data set by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml

from manyicl.conversion.material import Material, Part
from manyicl.errors import UserError, list_some, suggest
from manyicl.tasks import data_suffix

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
# How long the Hub may take to answer at all.
_PATIENCE_S = 5.0
_REVISION = re.compile(r"@([0-9a-f]{40})/")


def read_card(folder: Path) -> dict[str, Any]:
    """Return the metadata at the start of a folder's README.md; {} if it has none.

    Raises:
        UserError: the metadata are not valid YAML.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    found = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        return {}
    try:
        card = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that no calendar has
        why = " ".join(str(error).split())
        raise UserError(f"{path}: its metadata are not valid YAML ({why}); correct them") from error
    return card if isinstance(card, dict) else {}


def read_configs(folder: Path, *, config: str | None) -> Material | None:
    """Return the files of one configuration that a folder's README lists; None if it lists none.

    config: its name. Default: the only one, or the one called "default".

    Raises:
        UserError: it is unclear which configuration is meant, or one of its files does not exist.
    """
    listed = read_card(folder).get("configs")
    configs = {
        str(one.get("config_name", "default")): one["data_files"]
        for one in (listed if isinstance(listed, list) else ())
        if isinstance(one, dict) and one.get("data_files")
    }
    if not configs:
        return None
    chosen = choose_config(folder, list(configs), config)
    files = configs[chosen]
    entries = files if isinstance(files, list) else [files]
    parts = []
    for entry in entries:
        split, patterns = (entry.get("split", ""), entry.get("path", [])) if isinstance(entry, dict) else ("", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            try:
                found = sorted(path for path in folder.glob(str(pattern)) if path.is_file())
            except (ValueError, NotImplementedError):  # an empty pattern, or an absolute one
                found = []
            if not found:
                raise UserError(f"{folder / 'README.md'}: config '{chosen}': no file matches '{pattern}'")
            for path in found:
                if not data_suffix(path):
                    raise UserError(f"{path}: is not a file that is read; download the data set as Parquet or JSON")
                parts.append(Part(path, str(split or "train"), str(path.relative_to(folder))))
    name = folder.resolve().name if len(configs) == 1 else f"{folder.resolve().name}_{chosen}"
    origin = {"source": folder.resolve().name, "config": chosen}
    return Material(
        name, tuple(parts), kind="a data set of the Hub", class_names=read_class_names(folder, chosen), origin=origin
    )


def choose_config(source: object, known: list[str], config: str | None) -> str:
    """Return which of several configurations is meant.

    Raises:
        UserError: there is no such configuration, or there are several and none is named.
    """
    if config is not None:
        if config not in known:
            raise UserError(f"{source}: has no config '{config}'{suggest(config, known)}")
        return config
    if len(known) == 1 or "default" in known:
        return "default" if "default" in known else known[0]
    raise UserError(f"{source}: has the configs {list_some(known, most=12)}; name one as `config`")


def read_class_names(folder: Path, config: str | None) -> dict[str, tuple[str, ...]]:
    """Return column -> names of its classes, from README.md or dataset_infos.json; {} if neither says them.

    config: whose columns are meant, if the folder describes several.
    """
    for features in (*_card_features(folder, config), *_legacy_features(folder, config)):
        names = {name: found for name, feature in features.items() if (found := _names_of(feature))}
        if names:
            return names
    return {}


def _card_features(folder: Path, config: str | None) -> Iterator[Mapping[str, Any]]:
    infos = read_card(folder).get("dataset_info") or []
    for info in infos if isinstance(infos, list) else [infos]:
        features = info.get("features") if isinstance(info, dict) else None
        if isinstance(features, list) and (config is None or info.get("config_name", config) == config):
            yield {one["name"]: one.get("dtype") for one in features if isinstance(one, dict) and "name" in one}


def _legacy_features(folder: Path, config: str | None) -> Iterator[Mapping[str, Any]]:
    for path, is_single in ((folder / "dataset_infos.json", False), (folder / "dataset_info.json", True)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        infos = {config: content} if is_single else content
        for name, info in infos.items() if isinstance(infos, dict) else ():
            features = info.get("features") if isinstance(info, dict) else None
            if isinstance(features, dict) and config in (None, name):
                yield features


def _names_of(feature: object) -> tuple[str, ...]:
    """Return the class names of a feature as a README ({"class_label": {"names": {...}}}) or a JSON file has it."""
    if not isinstance(feature, dict):
        return ()
    described = feature.get("class_label") or feature
    names = described.get("names") if isinstance(described, dict) else None
    if isinstance(names, dict):
        numbered = {int(key): name for key, name in names.items() if str(key).isdecimal()}
        names = [numbered[number] for number in sorted(numbered)]
    return tuple(map(str, names)) if isinstance(names, list) else ()


def load_from_hub(name: str, *, config: str | None, revision: str | None, staging: Path) -> Material:
    """Return a data set of the Hub by its name, through the `datasets` library, which keeps it in its cache.

    staging: a folder for its splits as Parquet.

    Raises:
        UserError: `datasets` is not installed, or there is no such data set, config or revision, or no network.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: no such file or folder; if it is a data set of the Hugging Face Hub, pip install {error.name}"
        ) from error
    settings, hub = datasets.config, datasets.config.HF_ENDPOINT
    is_offline = bool(settings.HF_HUB_OFFLINE)
    is_reached = True
    try:
        is_reached = is_offline or _is_reached(hub)
        # Not reached, it gives what is in its cache, at once; else it would ask the Hub again and again for a minute.
        settings.HF_HUB_OFFLINE = is_offline or not is_reached
        loaded = datasets.load_dataset(name, config, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if not is_reached:
            fix = "connect this computer, or import a folder that was downloaded on another"
            raise UserError(f"{name}: no such file or folder, and the Hub ({hub}) cannot be reached; {fix}") from error
        why = " ".join(str(error).split())
        raise UserError(f"{name}: no such file or folder, and the Hub does not give it ({why})") from error
    finally:
        settings.HF_HUB_OFFLINE = is_offline
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    parts, commits = [], set[str]()
    for split, rows in splits.items():
        path = staging / f"{split}.parquet"
        rows.to_parquet(path)
        parts.append(Part(path, str(split), f"{name}, split {split}"))
        commits |= {found[1] for url in rows.info.download_checksums or () if (found := _REVISION.search(str(url)))}
    chosen = next(iter(splits.values())).info.config_name
    origin = {"source": name, "config": str(chosen or "default")}
    if len(commits) == 1 or revision:
        origin["revision"] = commits.pop() if len(commits) == 1 else str(revision)
    stem = name.rsplit("/", 1)[-1] + (f"_{chosen}" if chosen not in (None, "default", "plain_text") else "")
    stale = f"the Hub ({hub}) cannot be reached: this is this computer's copy, which may be older than the Hub's"
    notes = () if is_reached else (stale,)
    return Material(stem, tuple(parts), kind="a data set of the Hub", origin=origin, notes=notes)


def _is_reached(url: str) -> bool:
    """Return whether a server answers, whatever it says."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_PATIENCE_S):
            return True
    except (HTTPError, HTTPException):
        return True
    except OSError as error:  # a certificate that Python does not know may be known to the Hub's library
        return isinstance(getattr(error, "reason", None), SSLError)
