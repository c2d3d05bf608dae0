"""Where models lie: those that ship with the package, runs, adapters and the bases they name."""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path
from typing import Any

from manyicl.episodes import TemplateSettings
from manyicl.errors import UserError
from manyicl.files import read_object

# Weights, tokenizer, card and training curve; made by scripts/train_seed.py.
SEED_MODEL = Path(__file__).parent / "seed_model"
# Plain prose of our own, which the seed model never read; to measure forgetting on.
NEUTRAL_TEXT = Path(__file__).parent / "neutral.txt"
# How the world's tasks are asked; no text that the seed model read looks like it.
TEMPLATE = TemplateSettings(input="{input} ->\n")

# The file in a base's folder that `make bases` writes last: where the weights come from, and their hash.
BASE_SOURCE = "SOURCE.json"
# An adapter on SmolLM2-135M-Instruct, trained by ManyICL; made by scripts/smollm2_many.py.
SMOLLM2_MANY = Path(__file__).parent / "smollm2_many"
# Names that a model of the package has wherever a model is named.
PACKAGED = {"seed": SEED_MODEL, "smollm2-many": SMOLLM2_MANY}

# How a message ends that refuses what was named as a model.
GIVE_MODEL = "give a folder in Hugging Face layout, a run, or a name on the hub"
# What a run's folder is known by, and the folder of its model; `training.RunFolder` owns the rest of it.
RUN_STATE, RUN_MODEL = "run.json", "model"
# What a run of a comparison spends: the run's folder with this at the end of its name.
RUN_PLAN = ".plan.json"


def bases_folder() -> Path:
    """Return the folder that holds the real pretrained models of `make bases`."""
    if named := os.environ.get("MANYICL_BASES"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "manyicl" / "bases"


def find_built_base() -> Path | None:
    """Return the folder of SmolLM2-135M-Instruct that `make bases` has built; None if it has not."""
    folder = bases_folder() / "smollm2-135m"
    return folder if (folder / BASE_SOURCE).is_file() else None


def locate_model(path: str) -> str:
    """Return the model folder of a run, that of a packaged model (`seed`, `smollm2-many`), or `path` itself.

    Raises:
        UserError: a run without a model, a file, or a path at which nothing is.
    """
    folder = Path(path).expanduser()
    if (folder / RUN_STATE).is_file():
        if not (folder / RUN_MODEL).is_dir():
            raise UserError(f"{path}: {_tell_no_model(folder, path)}")
        return str((folder / RUN_MODEL).absolute())
    if folder.is_dir():
        return str(folder.absolute())  # an adapter remembers it, and must find it from any folder
    if packaged := PACKAGED.get(path):
        return str(packaged)
    if folder.exists():
        raise UserError(f"{path}: is a file, not a folder; {GIVE_MODEL}")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such folder; {GIVE_MODEL}")
    return path


def _tell_no_model(run: Path, path: str) -> str:
    """Return why a run has no model, and how it gets one. path: what the user calls the run."""
    is_compared = run.with_name(f"{run.name}{RUN_PLAN}").is_file()
    command = f"manyicl train --resume {shlex.quote(path)}"  # the whole command, since eval and ask have no --resume
    if not (read_object(run / RUN_STATE) or {}).get("finished"):
        whole = " its comparison" if is_compared else f": {command}"
        return f"this run has not finished, so it has no model; go on with{whole}"
    trained = f"delete {path}, and `resume` of its comparison trains it again"
    again = trained if is_compared else f"make it again with: {command}"
    return f"this run has finished, but its folder '{RUN_MODEL}' has gone; put it back, or {again}"


def fingerprint_weights(folder: str) -> str | None:
    """Return a hash of the safetensors files in a folder, of their sizes and samples; None if there are none.

    It stays the same when files are moved or copied. 64 samples of 64 KiB a file tell apart what was trained apart, and
    take less than a second for any model.
    """
    digest = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in sorted({size * number // 64 for number in range(64)}):
                file.seek(place)
                digest.update(file.read(2**16))
    return digest.hexdigest() if files else None


def find_source(path: str, file: str, *, revision: str | None = None) -> tuple[str, str | None]:
    """Return where to load from, and which revision: the base of an adapter whose folder does not hold `file`.

    Raises:
        UserError: it is a folder that has no such base, or that was cloned without its large files.
    """
    source = locate_model(path)
    adapter = read_adapter(path)
    if adapter is None or (Path(source) / file).is_file():
        _refuse_pointers(Path(source))
        return source, revision
    base = _locate_base(Path(source), adapter["base_model_name_or_path"])
    _refuse_pointers(Path(base))
    return base, adapter.get("revision")


def _locate_base(adapter: Path, base: str) -> str:
    """Return where the base of an adapter is: beside the adapter if its name is relative, or where it was moved to.

    A base that has gone from its absolute path may have been moved together with its run, which knows its fingerprint:
    it is looked for under the same name above the run.

    Raises:
        UserError: an absolute path that has gone, and no folder with the same weights was found.
    """
    path = Path(base).expanduser()
    if adapter == SMOLLM2_MANY and (built := find_built_base()):
        return str(built)
    if not path.is_absolute():
        beside = [place / path for place in (adapter, adapter.parent) if (place / path / "config.json").is_file()]
        return str(beside[0].resolve()) if beside else locate_model(base)
    if path.is_dir():
        return str(path)
    run = adapter.parent / RUN_STATE
    expected = (read_object(run) or {}).get("weights") if run.is_file() else None
    places = [place.joinpath(*path.parts[-depth:]) for place in adapter.parents for depth in (3, 2, 1)]
    for place in places if expected else []:
        if (place / "config.json").is_file() and fingerprint_weights(str(place)) == expected:
            return str(place)
    raise UserError(
        f"{adapter}: its base {base} is not there any more; put it back, or correct base_model_name_or_path in"
        f" {adapter / 'adapter_config.json'}"
    )


def _refuse_pointers(folder: Path) -> None:
    """Refuse a folder that was cloned without its large files.

    Raises:
        UserError: naming the first that is missing.
    """
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: is a Git LFS pointer, not the file itself; fetch it: git lfs pull, in {folder}")


def read_adapter(path: str) -> dict[str, Any] | None:
    """Return the adapter_config.json of the adapter at `path`; None if it is not an adapter.

    Raises:
        UserError: it cannot be read, or names no base.
    """
    file = Path(locate_model(path)) / "adapter_config.json"
    if not file.is_file():
        return None
    content = read_object(file)
    base = None if content is None else content.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        return content
    raise UserError(f"{file}: is not an adapter's config that names its base (base_model_name_or_path); save it anew")
