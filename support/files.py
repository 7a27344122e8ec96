"""Files in and out: what the scripts read is checked here, once; what they write appears whole or not at all.

`BadInput` is the one exception for "the user's files or flags are wrong". Each script's `main` turns it into a one-line
message; every other exception is a bug in our code and keeps its traceback.
"""

import errno
import io
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from rewards import CLASSES

REQUIRED = {"file_name": str, "id": str, "label": str, "question": str, "answer": str, "box": list}
OPTIONAL = {"volume": str, "patient": str, "category": str, "text": str, "slice": int, "finding": int}
OPTIONAL |= {"boxes": list, "patch": int}
# Of dataset_info.json; a folder for 03 to 05 that 02 did not make needs none of them.
INFO = {"phantoms": bool, "settings": dict, "records": dict, "classes": dict, "skipped": list}
MIN_SIDE, MAX_SIDE = 28, 4096  # px; 28 is one merged Qwen2.5-VL patch, and no CT is wider than 4096
MADE = (".work", "train", "test", "overview.png", "dataset_info.json")  # by 01 and 02 in their folders
OTHERWISE = "choose another --out, or --overwrite it"


class BadInput(Exception):
    """A file, a record or a flag that cannot be used; the message is one line: which one, what is wrong, the remedy."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, a full disk or a folder that must not be written ends in BadInput naming `path`."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise BadInput(f"{path}: cannot be written: {error}") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save's writer
            raise
        raise BadInput(f"{path}: cannot be written: the disk is full") from error


def writes(function: Callable) -> Callable:
    """Decorates a function that writes to the path that is its first argument: all of it lies within `writing`."""

    @wraps(function)
    def wrapped(path: Path, *args, **kwargs):
        with writing(path):
            return function(path, *args, **kwargs)

    return wrapped


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` under a temporary name, then rename: `path` is never half-written. Makes its folder when needed.

    The temporary name is fixed, so a run that is repeated after an interruption also tidies up what that one left.
    Raises BadInput when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, or BadInput when an absolute `name`, `..` or a link would lead out of the folder."""
    if not name or "\0" in name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{folder}: the name {name!r} leads out of this folder")
    return folder / name


def read_bytes(path: Path) -> bytes:
    """The content of `path`. Raises BadInput when it is missing or cannot be read."""
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def check_regular(path: Path) -> None:
    """Raises OSError unless `path` is a file proper: a pipe would be waited for, a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_json(path: Path) -> object:
    """The JSON value in `path`. Raises BadInput when it is missing, unreadable or not JSON."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from error


def open_work(out: Path, settings: dict, script: str, overwrite: bool = False) -> None:
    """Starts or continues the output folder of `script` (01 or 02), which keeps its settings under `out`/.work.

    A folder made with other settings or by something else raises BadInput; with `overwrite`, what these scripts write
    is deleted from it and all else stays.
    """
    path, wanted = out / ".work" / "settings.json", json.loads(json.dumps({"script": script, **settings}))
    try:
        found = read_json(path) if path.exists() else None
        if found == wanted:
            return
        if overwrite and out.is_dir():
            for part in (out / name for name in MADE):
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
        elif found is not None:
            differ = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
            raise BadInput(f"{out}: made with other settings ({', '.join(differ)}); {OTHERWISE}")
        elif out.exists() and (not out.is_dir() or any(one.name != ".work" for one in out.iterdir())):
            raise BadInput(f"{out}: exists and was not made by {script}; {OTHERWISE}")
    except OSError as error:
        raise BadInput(f"{error.filename or out}: {error.strerror}; choose another --out") from error
    write_atomic(path, json.dumps(wanted, indent=1))


def dataset_info(folder: Path) -> dict:
    """The `dataset_info.json` of a folder that 01 or 02 wrote; its key "stage" is "01" or "02". Raises BadInput."""
    info = read_json(Path(folder) / "dataset_info.json")
    if not isinstance(info, dict) or info.get("stage") not in ("01", "02"):
        raise BadInput(f"{folder}/dataset_info.json: no stage 01 or 02 in it; make the folder with 01_make_dataset.py")
    for field, kind in INFO.items():
        if (field in info or info["stage"] == "01") and type(info.get(field)) is not kind:
            raise BadInput(f"{folder}/dataset_info.json: field {field!r} must be of type {kind.__name__}")
    return info


def read_records(folder: Path, split: str) -> list[dict]:
    """The checked records of `folder/<split>/metadata.jsonl`, each with its picture's Path under the key "image".

    Raises BadInput, naming file, line and field, for the first line that is not a usable record.
    """
    path, records, seen = Path(folder) / split / "metadata.jsonl", [], set()
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            record = json.loads(line)
            _check(record, seen)
            picture = inside(path.parent, record["file_name"])
            if not picture.is_file():
                raise BadInput(f"field 'file_name': there is no picture {picture}")
        except (OSError, ValueError, RecursionError, BadInput) as error:
            raise BadInput(f"{path}, line {number}: {error}; mend the line or make the folder again") from error
        seen.add(record["id"])
        records.append({**record, "image": picture})
    return records


def _check(record: object, seen: set[str]) -> None:
    """Raises BadInput, naming the field, when one metadata line is not a usable record."""
    if not isinstance(record, dict):
        raise BadInput("not a JSON object")
    for field, kind in {**REQUIRED, **OPTIONAL}.items():
        if field not in record and field in REQUIRED:
            raise BadInput(f"field {field!r} is missing")
        if field in record and type(record[field]) is not kind:
            raise BadInput(f"field {field!r} must be of type {kind.__name__}")
    for box in [record["box"], *record.get("boxes", [])]:
        whole = isinstance(box, list) and len(box) == 4 and all(type(edge) is int for edge in box)
        if not whole or not (0 <= box[0] < box[2] <= MAX_SIDE and 0 <= box[1] < box[3] <= MAX_SIDE):
            raise BadInput("field 'box': [x0, y0, x1, y1] in whole px, 0 <= x0 < x1, 0 <= y0 < y1, is needed")
    if record["label"] not in CLASSES:
        raise BadInput(f"field 'label': {record['label']!r} is not one of the seven classes")
    if not record["id"] or record["id"] in seen:
        raise BadInput(f"field 'id': {record['id']!r} is empty or was used before")


def open_picture(path: Path) -> Image.Image:
    """The decoded picture in `path`. Raises BadInput when it is missing, broken, or not 28 to 4096 px on each side."""
    try:
        with Image.open(path) as picture:
            if not all(MIN_SIDE <= side <= MAX_SIDE for side in picture.size):
                raise BadInput(f"{path}: {picture.size} px; each side must be {MIN_SIDE} to {MAX_SIDE} px")
            picture.verify()  # the file's own checksums, which decoding does not look at; afterwards it is used up
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: cannot be read as a picture: {error}") from error


def png_bytes(picture: Image.Image) -> bytes:
    """`picture` as the content of a PNG file: the settings take half the default's time and are as small or smaller."""
    buffer = io.BytesIO()
    gray = picture.mode == "L"  # a noisy CT has hardly anything that repeats but runs; a coloured patch has
    picture.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE if gray else zlib.Z_DEFAULT_STRATEGY)
    return buffer.getvalue()
