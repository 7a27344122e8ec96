"""Files in and out: what is read is checked here, what is written appears whole or not at all.

`BadInput` is the one exception for "the user's files or flags are wrong". A script ends on it in
one line; every other exception is a bug in our code and keeps its traceback.
"""

import errno
import hashlib
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
KINDS = ("PNG", "JPEG")  # of pictures
MAX_SCANS = 32  # of a JPEG: cameras write 10, and each costs as much as a whole picture
ANEW = "choose another --out, or start anew with --overwrite"


class BadInput(Exception):
    """A file, record or flag cannot be used. One line: which one, what is wrong, the remedy."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def reason(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    if isinstance(error, UnicodeEncodeError):
        return "the name is not UTF-8; rename it"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


# ==== Writing ====


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, a full disk or a folder that must not be written ends in BadInput naming `path`."""
    try:
        str(path).encode()  # a name that is not UTF-8 would stop the libraries that write
        yield
    except (OSError, UnicodeError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written: {reason(error)}") from error
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
    inputs: tuple[Path, ...] = (),
) -> None:
    """Makes the output folder `out` this command's, or raises BadInput.

    `record` is the file below `out` that keeps the settings, `outputs` are glob patterns of what
    the script writes there. With the same settings and `go_on` the work is continued. `overwrite`
    deletes the outputs of this script made with other settings; files of other names stay. With
    .work/settings.json damaged the outputs are made again: of what settings they are is unknown.
    `inputs` are folders that must not lie in `out`.
    """
    for folder in inputs:
        if not os.path.isdir(folder):
            raise BadInput(f"{folder}: no such folder")
        if lies_in(folder, out):
            raise BadInput(f"{folder}: lies in --out, where files are replaced; choose another")
    path = out / record
    wanted = json.loads(json.dumps(settings, default=str))
    with writing(out):
        try:
            found = read_json(path) if os.path.lexists(path) else None
        except BadInput:
            if record != SETTINGS:
                raise
            found, overwrite = {"script": wanted["script"]}, True
        if found == wanted and go_on:
            return
        ours = isinstance(found, dict) and found.get("script") == wanted.get("script")
        if ours and go_on and not overwrite:
            keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
            key = (keys or ["script"])[0]
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


@contextmanager
def reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Within, what is wrong with the file `path` ends in BadInput naming it; all is read within.

    It must be a file proper: a pipe never ends, nor may a device. `errors` are what damaged content
    makes its reader raise, beside OSError and ValueError.
    """
    try:
        str(path).encode()
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield
    except (OSError, ValueError, MemoryError, *errors) as error:
        raise BadInput(f"{path}: cannot be read: {reason(error)}") from error


def read_bytes(path: Path) -> bytes:
    """The content of `path`. Raises BadInput when it is missing or cannot be read."""
    with reading(path):
        return path.read_bytes()


def read_json(path: Path) -> object:
    """The JSON value in `path`. Raises BadInput when it is missing, unreadable or not JSON."""
    with reading(path, RecursionError):  # bad JSON and bad UTF-8 are ValueErrors
        return json.loads(read_bytes(path).decode("utf-8-sig"))


def keep(path: Path, value: object) -> None:
    """Writes finished work, a JSON value, behind its checksum."""
    text = json.dumps(value)
    write_atomic(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def kept(path: Path) -> object | None:
    """What `keep` wrote to `path`; None when it is missing or damaged, and is to be made again."""
    try:
        digest, _, text = read_bytes(path).partition(b"\n")
    except BadInput:
        return None
    return json.loads(text) if digest == hashlib.sha256(text).hexdigest().encode() else None


def digest(value: object) -> str:
    """A short name for a JSON value, or for the bytes of a file."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def lies_in(path: Path, folder: Path) -> bool:
    """Whether `path`, all links followed, is `folder` or within it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises BadInput when `name` is absolute, or `..` or a link leads outside."""
    try:
        within = name and lies_in(folder / name, folder)
    except ValueError:  # a NUL, or no Unicode
        within = False
    if not within:
        raise BadInput(f"{folder}: {name!r:.80} is no file's name, or leads out of this folder")
    return folder / name


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
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadInput("a text in it is not Unicode, or it is too deep") from error


# ==== Pictures ====


def open_picture(path: Path) -> Image.Image:
    """The decoded picture in `path`, a PNG or JPEG file.

    Raises BadInput when it is anything else, broken, too small or too large.
    """
    content = read_bytes(path)
    with reading(path, Exception):  # damaged files make Pillow raise nearly anything
        if not content.startswith((b"\x89PNG", b"\xff\xd8")):
            raise ValueError("neither a PNG nor a JPEG file")
        if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
        picture = Image.open(io.BytesIO(content), formats=KINDS)
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in picture.size):
            limits = f"each side must be {MIN_SIDE} to {MAX_SIDE} px"
            raise ValueError(f"{picture.size} px; {limits}")
        picture.verify()  # the checksums, which decoding does not look at; it uses the picture up
        picture = Image.open(io.BytesIO(content), formats=KINDS)
        picture.load()
        if picture.mode.startswith("I") and picture.getextrema()[1] > 255:  # it would turn white
            raise ValueError("16 bits per px; save it with 8")
        picture.info.clear()  # a transparent colour of the wrong form makes conversions fail
        return picture


def png_bytes(picture: Image.Image) -> bytes:
    """`picture` as a PNG file: in half the time of Pillow's defaults, as small or smaller."""
    # A noisy CT has hardly anything that repeats but runs; a coloured patch has.
    kind = zlib.Z_RLE if picture.mode == "L" else zlib.Z_DEFAULT_STRATEGY
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1, compress_type=kind)
    return buffer.getvalue()
