"""Uploads: a file or JSON in a request's body -> a path or rows that the service reads, within limits of size."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pyarrow.parquet as pq
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from manyicl.errors import UserError
from manyicl.server.problems import ProblemError, without_folder
from manyicl.server.routes.bodies import UploadBody

_UNSAFE = re.compile(r"[^\w. -]+")
# Characters, and bytes, of a file's name; systems take 255 bytes, and a task.json has a longer name.
_MOST_NAME, _MOST_NAME_BYTES = 100, 200
# Rows of a Parquet file that are unpacked at once to find out how long it is.
_UNPACKED_ROWS = 16
_CHUNK = 1 << 20
# The body of an upload in the OpenAPI document; FastAPI cannot derive one that is either a form or JSON.
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "CSV, TSV, JSON, JSON Lines (also .gz) or Parquet, by its suffix.",
                        },
                        "name": {"type": "string", "description": "The task's name. Default: the file's."},
                        "settings": {"type": "string", "description": "The content of a task.json."},
                    },
                }
            },
            "application/json": {"schema": UploadBody.model_json_schema(ref_template="#/components/schemas/{model}")},
        },
    }
}


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client hands over."""

    rows: Path | Sequence[Mapping[str, Any]]
    """A file, or examples that came as JSON."""
    name: str | None
    settings: Mapping[str, Any] | None
    """As in a task.json."""


@asynccontextmanager
async def receiving(request: Request, *, most_bytes: int, limiter: CapacityLimiter) -> AsyncIterator[Upload]:
    """Give the block the upload in a request's body. A file lies in a temporary folder until the block ends.

    most_bytes: how long it may be when it is unpacked. limiter: of the threads that read bodies.

    Raises:
        ProblemError: the body is neither a form with a file nor JSON, or is too long.
        ValidationError: the JSON is not an upload.
        UserError: from the block, with messages that name the file alone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield await run_sync(_read_json, await request.body(), limiter=limiter)  # 60 MiB of short rows take 20 s
        return
    if kind != "multipart/form-data":
        raise ProblemError(
            "unsupported-media-type", 415, "send a form with a file (curl -F file=@rows.csv), or application/json"
        )
    folder = Path(await run_sync(tempfile.mkdtemp, None, "manyicl-upload-"))
    try:
        async with request.form(max_files=1, max_fields=2, max_part_size=_CHUNK) as form:
            file, name, settings = _read_fields(form)
            path = await run_sync(_save, file, folder, most_bytes, limiter=limiter)
        try:
            yield Upload(path, name, settings)
        except UserError as error:
            raise without_folder(error, folder) from None
    finally:
        await run_sync(lambda: shutil.rmtree(folder, ignore_errors=True), abandon_on_cancel=False)


def _read_json(content: bytes) -> Upload:
    body = UploadBody.model_validate_json(content)
    return Upload([example.to_row() for example in body.examples], body.name, body.settings)


def _read_fields(form: FormData) -> tuple[UploadFile, str | None, Mapping[str, Any] | None]:
    """Return the file, the name and the settings of a form."""
    unknown = sorted(set(form) - {"file", "name", "settings"})
    if unknown:
        raise ProblemError(
            "invalid-request", 422, f"{unknown[0][:50]!r}: is not a field of this form; it has file, name, settings"
        )
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ProblemError(
            "invalid-request", 422, "file: is missing from the form (curl -F file=@rows.csv)", param="file"
        )
    name, text = form.get("name"), form.get("settings")
    if isinstance(name, UploadFile) or isinstance(text, UploadFile):
        raise ProblemError("invalid-request", 422, "name and settings are texts, not files")
    if not text:
        return file, name or None, None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ProblemError(
            "invalid-request", 422, "settings: is not a JSON object, as in a task.json", param="settings"
        )
    return file, name or None, settings


def _save(file: UploadFile, folder: Path, most_bytes: int) -> Path:
    """Copy an uploaded file into a folder under a safe form of its name; return its path."""
    given = PurePath((file.filename or "").replace("\\", "/")).name
    end = _UNSAFE.sub("_", given).encode()[-_MOST_NAME_BYTES:].decode(errors="ignore")  # with the suffix
    name = end[-_MOST_NAME:].lstrip(". ")
    if not name:
        raise ProblemError(
            "invalid-request", 422, "file: has no name; its suffix says how it is read (rows.csv)", param="file"
        )
    path = folder / name
    with path.open("wb") as target:
        shutil.copyfileobj(file.file, target, _CHUNK)
    _check_unpacked(path, most_bytes)
    return path


def _check_unpacked(path: Path, most_bytes: int) -> None:
    """Refuse a file that would be too long when it is unpacked; a few kilobytes can unpack to gigabytes."""
    try:
        is_too_long = any(size > most_bytes for size in _measure_unpacked(path))
    except Exception:  # a broken file: its reader says what is wrong with it
        return
    if is_too_long:
        detail = f"{path.name}: is longer than {most_bytes >> 20} MiB when unpacked; send it in parts"
        raise ProblemError("body-too-large", 413, detail)


def _measure_unpacked(path: Path) -> Iterator[int]:
    """Yield how many bytes a compressed file has so far, while it is unpacked."""
    size = 0
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                yield (size := size + len(chunk))
    elif path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as table:
            groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
            yield sum(group.total_byte_size for group in groups)  # which has a text of many rows once
            for batch in table.iter_batches(batch_size=_UNPACKED_ROWS):
                yield (size := size + batch.nbytes)
