"""Files in and out: what is read is checked here, what is written appears whole or not at all.

`BadInput` is the one exception for "the user's files or flags are wrong". A script ends on it in
one line; every other exception is a bug in our code and keeps its traceback.
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
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

MIN_SIDE, MAX_SIDE = 28, 4096  # px; 28 is one merged Qwen2.5-VL patch, and no CT is wider than 4096
SETTINGS = ".work/settings.json"  # what 01, 02 and 05 keep of their settings
ANEW = "choose another --out, or start anew with --overwrite"


class BadInput(Exception):
    """A file, record or flag cannot be used. One line: which one, what is wrong, the remedy."""


# ==== Writing ====


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


def write_atomic(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes under a temporary name, then renames: `path` is never half-written.

    `content` is the data, or a function that writes the file it is given, whose suffixes are those
    of `path`. The temporary name is fixed, so that a repeated run tidies up what an interrupted one
    left. The folder is made when needed. Raises BadInput when the disk is full or not writable.
    """
    temporary = path.with_name(f".tmp.{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)


def claim(
    out: Path,
    settings: dict,
    outputs: tuple[str, ...],
    record: str = SETTINGS,
    go_on: bool = True,
    overwrite: bool = False,
) -> None:
    """Makes the output folder `out` this command's, or raises BadInput.

    `record` is the file below `out` that keeps the settings, `outputs` are glob patterns of what
    the script writes there. With the same settings and `go_on` the work is continued. `overwrite`
    deletes the outputs of this script made with other settings; files of other names stay.
    """
    path = out / record
    wanted = json.loads(json.dumps(settings, default=str))
    with writing(out):
        found = read_json(path) if path.exists() else None
        if found == wanted and go_on:
            return
        ours = isinstance(found, dict) and found.get("script") == wanted.get("script")
        if ours and go_on and not overwrite:
            key = next(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
            change = f"--{key.replace('_', '-')} was {found.get(key)} and is {wanted.get(key)} now"
            raise BadInput(f"{path}: made with other settings ({change:.200}); {ANEW}")
        old = {file for pattern in outputs for file in out.glob(pattern)} - {path}
        held = sorted(old)
        if record == SETTINGS and out.exists():  # a folder for one script alone
            held = sorted(file for file in out.iterdir() if file.name != ".work")
        if held and not (ours and overwrite):
            more = "" if go_on or overwrite else "go on with it by --resume, "
            raise BadInput(f"{out}: holds {held[0].name} of another run; {more}{ANEW}")
        for file in old:
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
    write_atomic(path, json.dumps(wanted, indent=1) + "\n")


# ==== Reading ====


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises BadInput when `name` is absolute, or `..` or a link leads outside."""
    if not name or "\0" in name:
        raise BadInput(f"{folder}: {name!r} is no file name")
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise BadInput(f"{folder}: the name {name!r} leads out of this folder")
    return folder / name


def check_regular(path: Path) -> None:
    """Raises OSError unless `path` is a file proper: a pipe never ends, nor may a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """The content of `path`. Raises BadInput when it is missing or cannot be read."""
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: Path) -> object:
    """The JSON value in `path`. Raises BadInput when it is missing, unreadable or not JSON."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from error


def check_fields(value: object, required: dict[str, type], optional: dict | None = None) -> None:
    """Raises BadInput, naming the field, unless `value` is a JSON object with these fields.

    Types are compared exactly: in JSON, true is no number.
    """
    if not isinstance(value, dict):
        raise BadInput("not a JSON object")
    for field, kind in (required | (optional or {})).items():
        if field in required and field not in value:
            raise BadInput(f"field {field!r} is missing")
        if field in value and type(value[field]) is not kind:
            raise BadInput(f"field {field!r} must be of type {kind.__name__}")


# ==== Pictures ====


def open_picture(path: Path) -> Image.Image:
    """The decoded picture in `path`. Raises BadInput when it is broken, too small or too large."""
    try:
        with Image.open(path) as picture:
            if not all(MIN_SIDE <= side <= MAX_SIDE for side in picture.size):
                limits = f"each side must be {MIN_SIDE} to {MAX_SIDE} px"
                raise BadInput(f"{path}: {picture.size} px; {limits}")
            picture.verify()  # the checksums, which decoding does not look at; it uses the file up
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: cannot be read as a picture: {error}") from error


def png_bytes(picture: Image.Image) -> bytes:
    """`picture` as a PNG file: in half the time of Pillow's defaults, as small or smaller."""
    # A noisy CT has hardly anything that repeats but runs; a coloured patch has.
    kind = zlib.Z_RLE if picture.mode == "L" else zlib.Z_DEFAULT_STRATEGY
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1, compress_type=kind)
    return buffer.getvalue()
