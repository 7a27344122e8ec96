"""Hostile inputs: each is a valid one with a single thing wrong, and what its one line must say.

Three tables, by what is damaged: VOLUMES (dataset.json, a CT or its mask; stage 01), RECORDS (a
dataset folder's metadata, pictures or dataset_info.json; stages 02 to 05) and CHECKPOINTS (a
model's folder; stages 03 to 05). The *_CONTROLS are unusual but valid, and must be accepted.
test_hostile.py runs them all.
"""

import gzip
import itertools
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import ct_fixtures as ct


@dataclass(frozen=True)
class Mutation:
    kind: str  # its family; ten or more belong to each
    name: str  # what is wrong
    apply: Callable  # damages a Volume, a Records or a checkpoint folder
    words: str = ""  # the message must hold it, beside the file's name

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


class Table(list):
    """The mutations of one kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, name: str, apply: Callable, words: str = "") -> None:
        self.append(Mutation(self.kind, name, apply, words))


JUNK = {"null": None, "true": True, "number": 7, "fraction": 1.5}
JUNK |= {"text": "x", "list": ["x"], "object": {"x": 1}}


def other_types(*valid: type) -> dict:
    """JUNK without the values of the valid JSON types; bool is no int here."""
    return {name: value for name, value in JUNK.items() if type(value) not in valid}


def flip(path: Path, at: int | None) -> None:
    """Inverts one byte, by default the middle one."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path, size: int | None) -> None:
    """Keeps the first `size` bytes, by default half of them."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if size is None else size])


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


# ==== Volumes, for 01: train_1_a_1 is good, train_2_a_1 is the one to damage ====


@dataclass
class Volume:
    root: Path
    ct: Path
    mask: Path
    entry: dict  # of dataset.json


SHAPE = (ct.WIDTH, ct.HEIGHT, ct.DEPTH)  # of the CT's file, "LPS"
BAD = "train_2_a_1.nii.gz"
BOTH = ("ct", "mask")


def build_volumes(root: Path, mutation: Mutation | None) -> list[str]:
    """Writes the good and the damaged volume and dataset.json under `root`; returns 01's flags."""
    good, entry = ct.add_case(root), ct.add_case(root, BAD)
    volume = Volume(root, ct.ct_path(root, BAD), ct.mask_path(root, BAD), entry)
    entries = mutation.apply(volume) if mutation else None
    return ct.write_index(root, entries if isinstance(entries, list) else [good, entry])


def on_file(which: str, change: Callable, *args) -> Callable:
    """Calls `change` with the path of the "ct" or the "mask", and `args`."""

    def apply(volume: Volume) -> None:
        change(getattr(volume, which), *args)

    return apply


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Applies `change` to the uncompressed bytes of a .nii.gz file."""
    ct.write_gz(path, change(gzip.decompress(path.read_bytes())))


def header(which: str, **fields) -> Callable:
    """Overwrites NIfTI header fields of the "ct" or the "mask", unchecked."""

    def change(data: bytes) -> bytes:
        old = ct.Nifti1Header(data[:348], check=False)
        for key, value in fields.items():
            old[key] = value
        return old.binaryblock + data[348:]

    return on_file(which, rewrite, change)


def voxels(which: str, array: np.ndarray) -> Callable:
    return on_file(which, ct.write_gz, ct.nifti(array, ct.affine_for("LPS")))


def entry(**fields) -> Callable:
    return lambda volume: volume.entry.update(fields)


def one_voxel(value: float, shape: tuple) -> np.ndarray:
    array = np.ones(shape, "f4")
    array[(-1,) * len(shape)] = value  # on a slice that is not even chosen
    return array


def replace(which: str, make: Callable[[Path], object]) -> Callable:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return on_file(which, change)


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


CUTS = {"to nothing": 0, "in gzip's header": 5, "after gzip's header": 10}
CUTS |= {"in the middle": None, "by one": -1, "by gzip's trailer": -8}
FLIPS = {"magic": 0, "method": 2, "reserved flag": 3}
FLIPS |= {"in the middle": None, "checksum": -6, "length": -2}


def gzip_faults() -> Table:
    table = Table("gzip")
    for which in BOTH:
        for name, n in CUTS.items():
            table.add(f"{which} cut {name}", on_file(which, cut, n))
        for name, n in FLIPS.items():
            table.add(f"{which} flipped: {name}", on_file(which, flip, n))
        plain = replace(which, lambda path: path.write_text("plain text" * 99))
        table.add(f"{which} is no gzip", plain)
        table.add(f"{which} with rubbish behind it", on_file(which, append, b"rubbish"))
        short = on_file(which, rewrite, lambda data: data[:-2])
        table.add(f"{which} ends inside", short, "truncated")
    return table


def header_faults() -> Table:
    table = Table("NIfTI header")
    for which in BOTH:
        table.add(f"{which} size", header(which, sizeof_hdr=7))
        table.add(f"{which} size negative", header(which, sizeof_hdr=-348))
        table.add(f"{which} magic of a pair", header(which, magic=b"ni1"))
        table.add(f"{which} magic of NIfTI-2", header(which, magic=b"n+2"))
        table.add(f"{which} no magic", header(which, magic=b""))
        table.add(f"{which} offset nan", header(which, vox_offset=np.nan))
        table.add(f"{which} offset infinite", header(which, vox_offset=np.inf))
        table.add(f"{which} offset huge", header(which, vox_offset=1e30))
        table.add(f"{which} offset negative", header(which, vox_offset=-352))
        table.add(f"{which} offset in the header", header(which, vox_offset=100))
    for which in BOTH:
        short = on_file(which, rewrite, lambda data: data[:200])
        table.add(f"{which} of 200 bytes", short, "NIfTI-1")
    for which in BOTH:
        ones = on_file(which, rewrite, lambda data: b"\xff" * 400)
        table.add(f"{which} of ones", ones, "NIfTI-1")
    return table


DIMENSIONS = {
    "30,000 cubed": [3, 30000, 30000, 30000, 1, 1, 1, 1],
    "32,767 to the fourth": [4, *[32767] * 4, 1, 1, 1],
    "seven axes": [7, *[32767] * 7],
    "one long axis": [4, 32767, 48, 12, 32767, 1, 1, 1],
    "zero": [3, 40, 0, 12, 1, 1, 1, 1],
    "negative": [3, 40, -48, 12, 1, 1, 1, 1],
    "no axis": [0, 40, 48, 12, 1, 1, 1, 1],
    "nine axes": [9, 40, 48, 12, 1, 1, 1, 1],
    "minus one axis": [-1, 40, 48, 12, 1, 1, 1, 1],
}


def dimension_faults() -> Table:
    table = Table("dimensions")
    for which in BOTH:
        for name, dim in DIMENSIONS.items():
            table.add(f"{which} {name}", header(which, dim=dim))

    def both(volume: Volume) -> None:
        header("ct", dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])(volume)
        volume.entry["shape"] = [1000, 1000, 1000]

    table.add("ct and dataset.json agree on a gigabyte", both, "asks for")
    return table


CODES = {"complex64": (32, 64), "complex128": (1792, 128), "complex256": (2048, 256)}
CODES |= {"RGB": (128, 24), "RGBA": (2304, 32), "bits": (1, 1)}
CODES |= {"none": (0, 0), "unknown": (999, 16), "below 0": (-3, 16)}


def dtype_faults() -> Table:
    table = Table("dtype")
    for which in BOTH:
        for name, (code, bits) in CODES.items():
            table.add(f"{which} {name}", header(which, datatype=code, bitpix=bits))
    for which in BOTH:
        claim = header(which, datatype=64, bitpix=64)
        table.add(f"{which} claims float64", claim, "truncated")
    return table


def number_faults() -> Table:
    table = Table("NaN, inf and affine")
    quaternion = {"sform_code": 0, "qform_code": 1}
    for name, x in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}.items():
        table.add(f"ct voxel {name}", voxels("ct", one_voxel(x, SHAPE)), "non-finite")
        mask = one_voxel(x, (1, *SHAPE))
        table.add(f"mask voxel {name}", voxels("mask", mask), "non-finite")
        table.add(f"affine {name}", header("ct", srow_x=[x, 0, 0, 0]), "affine")
        table.add(f"affine's shift {name}", header("ct", srow_z=[0, 0, 2, x]), "affine")
        table.add(f"intercept {name}", header("ct", scl_inter=x))
        table.add(f"mask's intercept {name}", header("mask", scl_inter=x))
        table.add(f"quaternion {name}", header("ct", **quaternion, quatern_b=x))
        sizes = [1, x, 1, 1, 1, 1, 1, 1]
        table.add(f"voxel size {name}", header("ct", **quaternion, pixdim=sizes))
        if x != x:
            continue  # a slope of NaN means "not scaled", as 0 does
        table.add(f"slope {name}", header("ct", scl_slope=x), "non-finite")
        table.add(f"mask's slope {name}", header("mask", scl_slope=x), "non-finite")
    table.add("affine zero", header("ct", srow_x=[0, 0, 0, 0]), "affine")
    flat = header("ct", srow_x=[1, 0, 0, 0], srow_z=[1, 0, 0, 0])
    table.add("affine flat", flat, "affine")
    lost = header("ct", srow_y=[1e30, 0.7, 0, 0])
    table.add("affine with an axis that has no direction", lost, "affine")
    table.add("no orientation", header("ct", sform_code=0), "orientation")
    return table


def shape_faults() -> Table:
    table = Table("2-D to 5-D and swapped axes")
    w, h, d = SHAPE
    swapped = [shape for shape in itertools.permutations(SHAPE) if shape != SHAPE]
    shapes = [(w,), (w, h), (w * h, d), (1, *SHAPE), (*SHAPE, 2), (2, *SHAPE)]
    shapes += [(*SHAPE, 1, 2), (w, h, d + 1)]
    for shape in [*shapes, *swapped]:
        table.add(f"ct {shape}", voxels("ct", np.zeros(shape, "i2")), "shape")
    shapes = [(w,), (w, h), (w * h, d), (2, *SHAPE), (w, 1, h, d), (*SHAPE, 2)]
    shapes += [(1, *SHAPE, 2), (1, w, h, d + 1)]
    shapes += [(1, *shape) for shape in swapped]
    for shape in shapes:
        table.add(f"mask {shape}", voxels("mask", np.ones(shape, "u1")), "finding")
    return table


ENTRY_FIELDS = {"name": str, "findings": dict, "categories": dict, "shape": list}
ENTRY_FIELDS |= {"pixels": dict, "entity_counts": dict, "protocol": str}
BAD_SHAPES = {
    "short": [40, 48],
    "fractions": [40.0, 48, 12],
    "booleans": [True, 48, 12],
    "zero": [0, 48, 12],
    "negative": [-40, 48, 12],
    "endless": [10**30, 48, 12],
    "of terabytes": [4096, 4096, 4096],
    "nested": [[40], 48, 12],
    "not the CT's": [48, 40, 12],
}


def entry_faults() -> Table:
    table = Table("dataset.json entry")
    for field, kind in ENTRY_FIELDS.items():
        for name, value in other_types(kind).items():
            table.add(f"{field} {name}", entry(**{field: value}), f"'{field}'")
    for name, shape in BAD_SHAPES.items():
        table.add(f"shape {name}", entry(shape=shape), "shape")
    table.add("findings empty", entry(findings={}), "'findings'")
    path = entry(findings={"../0": "x"}, categories={"../0": "2b"})
    table.add("finding's key a path", path, "'findings'")
    two = entry(findings={"0": "x", "1": "y"}, categories={"0": "2b", "1": "2b"})
    table.add("two findings, one in the mask", two, "finding")
    for name, value in other_types(str).items():
        table.add(f"finding's text {name}", entry(findings={"0": value}), "'findings'")
    table.add("finding's text a lone surrogate", entry(findings={"0": "\ud800"}), "Unicode")
    for name, value in other_types(str).items():
        table.add(f"category {name}", entry(categories={"0": value}), "'categories'")
    for name, value in other_types(dict).items():
        table.add(f"an entry is {name}", partial(with_entry, value), "not a JSON object")
    return table


def with_entry(value: object, volume: Volume) -> list:
    return [ct.add_case(volume.root), value]


def category_faults() -> Table:
    table = Table("unknown category")
    codes = ["9z", "", "2B", "2b ", "b2", "Emphysema", "1", "2b\n", "é", "1a/1b"]
    for code in [*codes, "x" * 5000]:
        table.add(f"{code!r:.12}", entry(categories={"0": code}), "unknown category")
    return table


NAMES = [f"../{BAD}", f"/etc/{BAD}", f"a/{BAD}", f"{BAD}\n", f"\0{BAD}", "train_٣_a_1.nii.gz"]
NAMES += ["..", "", ".", "brain.nii.gz", BAD.removesuffix(".gz"), "TRAIN_2_a_1.nii.gz"]
NAMES += ["train_2_../x_1.nii.gz", "x" * 10_000]
NOT_FILES = {
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to an endless file": lambda path: path.symlink_to("/dev/zero"),
}


def name_faults() -> Table:
    table = Table("names, links and missing files")
    for name in NAMES:
        table.add(f"name {name!r:.24}", entry(name=name), "'name'")

    def duplicate(volume: Volume) -> list:
        good = ct.add_case(volume.root)
        return [good, {**good, "findings": {"0": "another text"}}]

    table.add("name twice", duplicate, "duplicate")
    for which, words in (("ct", "no CT"), ("mask", "segmentations")):
        for name, make in NOT_FILES.items():
            table.add(f"{which} is {name}", replace(which, make), words)
    empty = voxels("mask", np.zeros((1, *SHAPE), "u1"))
    table.add("mask empty", empty, "empty mask")
    return table


def index_faults() -> Table:
    """A dataset.json that is of no use at all; applied to its path once it was written."""
    table = Table("dataset.json")

    def add(name: str, content: bytes) -> None:
        table.add(name, lambda index: index.write_bytes(content), "dataset.json")

    for name, value in JUNK.items():
        add(name, json.dumps(value).encode())
    for name, value in other_types(list).items():
        add(f"train {name}", json.dumps({"train": value}).encode())
    add("empty", b"")
    add("cut", b'{"train": [')
    add("deep", b"[" * 100_000)
    add("not UTF-8", b"\xff\xfe{}")
    add("nul", b"\0" * 99)
    add("only test", b'{"test": []}')
    return table


INDEXES = index_faults()
VOLUMES = gzip_faults() + header_faults() + dimension_faults() + dtype_faults()
VOLUMES += number_faults() + shape_faults() + entry_faults() + category_faults() + name_faults()


def two_members(volume: Volume) -> None:
    data = gzip.decompress(volume.ct.read_bytes())
    volume.ct.write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))


def without_optional_fields(volume: Volume) -> None:
    for field in ("pixels", "entity_counts", "protocol"):
        del volume.entry[field]


def linked_ct(volume: Volume) -> None:
    volume.ct.symlink_to(volume.ct.rename(volume.root / "ct_rate" / "away"))


def volume_controls() -> Table:
    table = Table("control")
    table.add("as it is", lambda volume: None)
    for kind in ("u1", "i2", ">i2", "u2", "i4", "f4", "f8"):
        table.add(f"ct of {kind}", voxels("ct", np.ones(SHAPE, kind)))
    for kind in ("u1", "i2", ">i4", "f4", "f8"):
        table.add(f"mask of {kind}", voxels("mask", np.ones((1, *SHAPE), kind)))
    table.add("a 3-D mask", voxels("mask", np.ones(SHAPE, "u1")))
    table.add("finding axis last", voxels("mask", np.ones((*SHAPE, 1), "u1")))
    table.add("gzip in two members", two_members)
    table.add("slope nan: not scaled", header("ct", scl_slope=np.nan))
    table.add("a qform only", header("ct", sform_code=0, qform_code=1))
    table.add("the mask's own affine is nan", header("mask", srow_x=[np.nan, 0, 0, 0]))
    table.add("optional fields missing", without_optional_fields)
    table.add("unknown fields", entry(reader={"name": "x"}, pages=[1]))
    table.add("a text of another script", entry(findings={"0": "磨玻璃影 \u202e <b>\n"}))
    table.add("ct is a link", linked_ct)
    return table


VOLUME_CONTROLS = volume_controls()


# ==== Records, for 02 (a folder of 01) and for 03 to 05 (a folder of 02) ====


@dataclass
class Records:
    """A dataset folder; its first training record is the one to damage."""

    folder: Path

    @property
    def metadata(self) -> Path:
        return self.folder / "train" / "metadata.jsonl"

    @property
    def info(self) -> Path:
        return self.folder / "dataset_info.json"

    def lines(self) -> list[str]:
        return self.metadata.read_text().splitlines()

    @property
    def picture(self) -> Path:
        return self.folder / "train" / json.loads(self.lines()[0])["file_name"]


REQUIRED = {"file_name": str, "id": str, "label": str, "question": str, "answer": str, "box": list}
FIELDS = {**REQUIRED, "volume": str, "patient": str, "category": str, "text": str}
FIELDS |= {"slice": int, "finding": int, "boxes": list, "slice_boxes": list}


def first_line(change: Callable[[dict], str]) -> Callable:
    def apply(records: Records) -> None:
        lines = records.lines()
        lines[0] = change(json.loads(lines[0]))
        records.metadata.write_text("\n".join(lines) + "\n")

    return apply


def record(**fields) -> Callable:
    return first_line(lambda old: json.dumps({**old, **fields}))


def without(field: str) -> Callable:
    def change(old: dict) -> str:
        del old[field]
        return json.dumps(old)

    return first_line(change)


def record_faults() -> Table:
    table = Table("metadata field")
    for field, kind in FIELDS.items():
        for name, value in other_types(kind).items():
            table.add(f"{field} {name}", record(**{field: value}), f"'{field}'")
    for field in REQUIRED:
        table.add(f"{field} missing", without(field), f"'{field}'")
    return table


LINES = {
    "empty": "",
    "blank": "   ",
    "cut": '{"id": "x',
    "number": "5",
    "text": '"x"',
    "null": "null",
    "list": "[]",
    "empty object": "{}",
    "nul": "\0",
    "deep": "[" * 100_000,
    "NaN": "NaN",
    "two": "{} {}",
    "digits": "9" * 10_000,
    "a comment": "# {}",
    "single quotes": "{'id': 'x'}",
}


def line_faults() -> Table:
    table = Table("metadata line")
    for name, text in LINES.items():
        table.add(name, first_line(lambda old, text=text: text), "line 1")

    def not_utf8(records: Records) -> None:
        records.metadata.write_bytes(b'{"id": "\xff"}\n' + records.metadata.read_bytes())

    table.add("not UTF-8", not_utf8, "line 1")
    return table


def link(target: str) -> Callable:
    def apply(records: Records) -> None:
        picture = records.picture
        (records.folder.parent / "outside.png").write_bytes(picture.read_bytes())
        picture.unlink()
        picture.symlink_to(target)

    return apply


def id_twice(records: Records) -> None:
    append(records.metadata, f"{records.lines()[0]}\n".encode())


def instead_of(part: str, make: Callable[[Path], object]) -> Callable:
    """Puts something else in place of the "picture", the "metadata" or the "info"."""

    def apply(records: Records) -> None:
        path = getattr(records, part)
        path.unlink()
        make(path)

    return apply


def images_elsewhere(records: Records) -> None:
    images = records.folder / "train" / "images"
    outside = records.folder.parent / "outside"
    shutil.move(images, outside)
    images.symlink_to(outside)


PATHS = ["../../outside.png", "/etc/hostname", "", ".", "..", "images/\0.png", "images/none.png"]
PATHS += ["images", "x" * 10_000, "images/../../../outside.png", "images/\ud800.png", "x" * 300]


def path_faults() -> Table:
    table = Table("paths, links and ids")
    for name in PATHS:
        table.add(f"file_name {name!r:.30}", record(file_name=name), "line 1")
    for target in ("../../../outside.png", "/etc/hostname", "none"):
        table.add(f"picture links to {target}", link(target), "line 1")
    itself = instead_of("picture", lambda path: path.symlink_to(path.name))
    table.add("picture links to itself", itself, "line 1")
    table.add("question a lone surrogate", record(question="\ud800"), "Unicode")
    table.add("id of two lines", record(id="a\nb", label="\n"), "'label'")
    table.add("the images' folder is a link", images_elsewhere, "leads out")
    table.add("id empty", record(id=""), "'id'")
    table.add("id twice", id_twice, "'id'")
    table.add("metadata missing", instead_of("metadata", lambda path: None))
    table.add("metadata a folder", instead_of("metadata", Path.mkdir))
    table.add("metadata a pipe", instead_of("metadata", os.mkfifo))
    return table


def id_faults() -> Table:
    """Ids that only 02 refuses, since it makes file names of them."""
    table = Table("id as a file name")
    ids = ["../x", "a/b", "/x", ".hidden", "x" * 300, "a\nb", "..", "-x", "a b", "\0", "é"]
    for name in ids:
        table.add(f"{name!r:.20}", record(id=name), "id")
    table.add("of the other split", id_of_test, "'id'")
    return table


def id_of_test(records: Records) -> None:
    other = (records.folder / "test" / "metadata.jsonl").read_text().splitlines()[0]
    record(id=json.loads(other)["id"])(records)


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims to be this large, whatever it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        content = kind + body
        return struct.pack(">I", len(body)) + content + struct.pack(">I", zlib.crc32(content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def inverted(data: bytes) -> bytes:
    return data[:60] + bytes(byte ^ 0xFF for byte in data[60:90]) + data[90:]


def same_picture(mode: str, kind: str) -> Callable:
    def apply(records: Records) -> None:
        path = records.picture
        Image.open(path).convert(mode).save(path, format=kind)

    return apply


def picture_faults() -> Table:
    table = Table("picture")

    def content(name: str, data: bytes) -> None:
        table.add(name, lambda records: records.picture.write_bytes(data))

    def change(name: str, function: Callable[[bytes], bytes]) -> None:
        table.add(name, lambda records: edit(records.picture, function))

    def size(name: str, width: int, height: int) -> None:
        picture = Image.new("L", (width, height))
        table.add(name, lambda records: picture.save(records.picture))

    content("empty", b"")
    content("text", b"no picture")
    content("a script", b"<svg onload='x'/>")
    content("PNG's signature alone", png(9, 9)[:8])
    change("cut in its header", lambda data: data[:20])
    change("cut in its data", lambda data: data[: len(data) // 2])
    change("without its end", lambda data: data[:-20])
    change("flipped", inverted)
    content("a bomb of 60,000 x 60,000", png(60_000, 60_000))
    content("a bomb of 2 billion px", png(2**31 - 1, 2**31 - 1))
    content("a bomb that inflates", png(20_000, 20_000, bytes(2_000_000)))
    content("4,000 px without data", png(4000, 4000))
    content("no width", png(0, 40))
    size("1 x 1", 1, 1)
    size("27 px high", 40, 27)
    size("20,000 px wide", 20_000, 30)
    size("20,000 px high", 30, 20_000)
    content("a PNG without pixels", png(40, 48))
    table.add("a GIF", same_picture("L", "GIF"))
    table.add("missing", instead_of("picture", lambda path: None))
    table.add("a folder", instead_of("picture", Path.mkdir))
    table.add("a pipe", instead_of("picture", os.mkfifo))
    return table


BOXES = [
    [],
    [1, 2, 3],
    [1, 2, 3, 4, 5],
    [1.0, 2, 3, 4],
    [False, False, True, True],
    ["1", "2", "3", "4"],
    [5, 5, 5, 9],
    [5, 9, 9, 9],
    [9, 5, 5, 9],
    [-5, 5, 5, 9],
    [0, 0, 10**12, 9],
    [0, 0, 4097, 9],
    [None] * 4,
    [[1, 2, 3, 4]],
]
# Beyond the picture's 40 x 48 px: 02 draws them, so it must look.
OUTSIDE = [
    [0, 0, 41, 10],
    [0, 0, 10, 49],
    [40, 0, 50, 10],
    [0, 48, 10, 60],
    [39, 47, 41, 49],
    [0, 0, 4096, 4096],
    [100, 100, 200, 200],
    [0, 47, 40, 4096],
    [20, 20, 30, 49],
    [4000, 4000, 4096, 4096],
]


def box_faults() -> Table:
    table = Table("box")
    for box in BOXES:
        table.add(f"box {box}", record(box=box), "'box'")
    for box in (*BOXES[1:4], "x", None, 5, {}):
        table.add(f"boxes hold {box!r}", record(boxes=[box]), "'box'")
    return table


def outside_faults() -> Table:
    table = Table("box outside the picture")
    for box in OUTSIDE:
        table.add(f"{box}", record(box=box, boxes=[box]), "does not lie")
    return table


LABELS = ["Normal", "emphysema", "EMPHYSEMA", " Emphysema", "Emphysema.", "", "Emphysema\n"]
LABELS += ["Emphysema; Normal", "1c", "Consolidation", "<script>alert(1)</script>", "x" * 10_000]


def label_faults() -> Table:
    table = Table("unknown label")
    for label in LABELS:
        table.add(f"{label!r:.24}", record(label=label), "'label'")
    return table


INFO = {"phantoms": bool, "settings": dict, "records": dict, "classes": dict, "skipped": list}


def info_field(name: str, value: object) -> Callable:
    """Sets a field of dataset_info.json, or deletes it when `value` is `...`."""

    def apply(records: Records) -> None:
        info = json.loads(records.info.read_text())
        info[name] = value
        if value is ...:
            del info[name]
        records.info.write_text(json.dumps(info))

    return apply


def info_faults() -> Table:
    """Faults in either stage's folder."""
    table = Table("dataset_info.json")

    def content(name: str, data: bytes) -> None:
        table.add(name, lambda records: records.info.write_bytes(data), "dataset_info.json")

    for name, value in JUNK.items():
        content(name, json.dumps(value).encode())
    content("empty", b"")
    content("cut", b'{"stage": "0')
    content("not UTF-8", b"\xff")
    content("deep", b"[" * 100_000)
    content("nul", b"\0")
    for value in ("03", "", "1", None, 1, ["01"], ...):
        table.add(f"stage {value!r}", info_field("stage", value), "stage")
    for name, kind in INFO.items():
        for what, value in other_types(kind).items():
            table.add(f"{name} {what}", info_field(name, value), f"'{name}'")
    table.add("missing", instead_of("info", lambda path: None), "dataset_info.json")
    return table


def absent_info() -> Table:
    """Fields that 01's folder must have and 02's may lack."""
    table = Table("dataset_info.json")
    for name in INFO:
        table.add(f"{name} missing", info_field(name, ...), f"'{name}'")
    return table


RECORDS = record_faults() + line_faults() + path_faults() + picture_faults() + box_faults()
RECORDS += label_faults() + info_faults()
RECORDS_02 = id_faults() + outside_faults() + absent_info()  # for 02 alone


def linked_picture(records: Records) -> None:
    path = records.picture
    path.symlink_to(path.rename(path.with_name("other.png")).name)


def on_metadata(change: Callable[[bytes], bytes]) -> Callable:
    return lambda records: edit(records.metadata, change)


def record_controls() -> Table:
    table = Table("control")
    table.add("as it is", lambda records: None)
    whole, corner = [0, 0, 40, 48], [39, 47, 40, 48]
    table.add("a box that fills the picture", record(box=whole, boxes=[whole]))
    table.add("a box of one px", record(box=corner, boxes=[corner]))
    for field in ("boxes", "slice_boxes", "text", "slice", "category"):
        table.add(f"{field} missing", without(field))
    table.add("unknown fields", record(reader={"name": "x"}, page=1))
    table.add("a text with tags", record(text="<script>alert(1)</script> \u202e"))
    for mode in ("L", "RGB", "RGBA", "P"):
        table.add(f"a picture of mode {mode}", same_picture(mode, "PNG"))
    table.add("a JPEG named .png", same_picture("L", "JPEG"))
    table.add("lines end in CRLF", on_metadata(lambda data: data.replace(b"\n", b"\r\n")))
    table.add("no end of line at the end", on_metadata(lambda data: data.rstrip(b"\n")))
    table.add("a picture that is a link within the folder", linked_picture)
    return table


RECORD_CONTROLS = record_controls()


# ==== Checkpoint folders, for 03 to 05 ====


def setting(file: str, *path: str, value: object = ...) -> Callable:
    """Sets (or deletes) the value at `path` within a JSON file of the folder."""

    def apply(folder: Path) -> None:
        whole = part = json.loads((folder / file).read_text())
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        if value is ...:
            del part[path[-1]]
        (folder / file).write_text(json.dumps(whole))

    return apply


def read_weights(folder: Path) -> dict:
    """Copies, so that the file may be written again."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def weights(change: Callable[[dict], dict]) -> Callable:
    """Replaces the checkpoint's tensors by what `change` makes of them."""

    def apply(folder: Path) -> None:
        tensors = change(read_weights(folder))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


class Explosive:
    """A pickle of it, loaded by anyone, leaves the file BOOM in the working folder."""

    def __reduce__(self):
        return (open, ("BOOM", "w"))


def pickled(name: str) -> Callable:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Explosive()))

    return apply


def token_lost(token: str) -> Callable:
    def apply(folder: Path) -> None:
        for path in folder.glob("*.json"):
            path.write_text(path.read_text().replace(token, token.replace("|", "!")))

    return apply


def with_file(name: str, content: bytes) -> Callable:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def without_file(name: str) -> Callable:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Callable:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


NEEDED = ["chat_template.jinja", "config.json", "model.safetensors", "preprocessor_config.json"]
NEEDED += ["tokenizer.json"]


def file_faults() -> Table:
    """Each file of the folder missing, empty, cut or rubbish; JSON files also of another type."""
    table = Table("checkpoint file")
    for name in NEEDED:
        words = "chat template" if name == "chat_template.jinja" else name
        table.add(f"{name} missing", without_file(name), words)
    for name in [*NEEDED, "generation_config.json", "tokenizer_config.json"]:
        words = {"chat_template.jinja": "", "model.safetensors": "safetensors"}.get(name, name)
        table.add(f"{name} empty", with_file(name, b""), words)
        table.add(f"{name} rubbish", with_file(name, b"\x80\x02rubbish"), words)
        table.add(f"{name} cut", lambda folder, name=name: cut(folder / name, None), words)
        table.add(f"{name} a folder", folder_instead(name))
        if not name.endswith("json"):
            continue
        for what, value in other_types(dict).items():
            table.add(f"{name} {what}", with_file(name, json.dumps(value).encode()), name)
        table.add(f"{name} deep", with_file(name, b"[" * 100_000), name)
    table.add("all missing", emptied, "config.json")
    return table


PICKLES = "pytorch_model.bin model.bin pytorch_model-00001-of-00001.bin model.pt checkpoint.pth"
PICKLES += " adapter_model.bin optimizer.pt training_args.bin weights.pt consolidated.pth"


def pickle_faults() -> Table:
    table = Table("checkpoint of pickles")
    for name in PICKLES.split():
        table.add(name, pickled(name), "model.safetensors is missing")
    named = with_file("model.safetensors", pickle.dumps(Explosive()))
    table.add("a pickle named model.safetensors", named, "safetensors")
    return table


SIZES = [
    ("text_config", "intermediate_size", 100),
    ("text_config", "vocab_size", 900),
    ("text_config", "num_attention_heads", 8),
    ("text_config", "num_key_value_heads", 4),
    ("vision_config", "intermediate_size", 300),
    ("vision_config", "depth", 5),
    ("vision_config", "patch_size", 16),
    ("vision_config", "out_hidden_size", 64),
    ("vision_config", "spatial_merge_size", 1),
    ("text_config", "hidden_size", 1_000_000),
]
GATE = "model.layers.0.mlp.gate_proj.weight"


def another_gate(change: Callable) -> Callable:
    return weights(lambda tensors: {**tensors, GATE: change(tensors[GATE])})


def shards_at(place: str) -> Callable:
    """An index that says where the weights lie, without them."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"a": place}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def weight_faults() -> Table:
    table = Table("weights that do not fit")
    for part, name, value in SIZES:
        size = setting("config.json", part, name, value=value)
        table.add(f"{part} {name} {value}", size)

    def lost(tensors: dict) -> dict:
        del tensors[GATE]
        return tensors

    table.add("a tensor missing", weights(lost), "gate_proj")
    table.add("a tensor of another shape", another_gate(lambda tensor: tensor[:-1].clone()))
    table.add("a tensor transposed", another_gate(lambda tensor: tensor.T.contiguous()))
    renamed = weights(lambda tensors: {f"x.{name}": t for name, t in tensors.items()})
    table.add("all tensors renamed", renamed)
    table.add("an index without its shards", shards_at("none.safetensors"))
    table.add("a shard out of the folder", shards_at("../../x.safetensors"))
    return table


def tokenizer_faults() -> Table:
    table = Table("tokenizer")
    for token in ("<|image_pad|>", "<|vision_start|>", "<|im_start|>", "<|im_end|>"):
        table.add(f"no {token}", token_lost(token))
    token_id = setting("config.json", "image_token_id", value=5)
    table.add("another id for the picture", token_id, "ids")

    def add(name: str, *path: str, value: object = ..., file: str = "tokenizer.json") -> None:
        table.add(name, setting(file, *path, value=value))

    add("no vocabulary", "model", "vocab", value={})
    add("vocabulary a list", "model", "vocab", value=[])
    add("no model", "model")
    add("added tokens of another type", "added_tokens", value="x")
    add("another version", "version", value="x")
    settings = "tokenizer_config.json"
    add("its class a list", "tokenizer_class", value=[], file=settings)
    add("its padding a list", "pad_token", value=[], file=settings)
    add("its length a text", "model_max_length", value="x", file=settings)
    templates = {
        "a template without a picture": b"{{ messages[0].role }}",
        "a template with an error": b"{% for %}",
        "a template that reaches for Python": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    }
    for name, template in templates.items():
        table.add(name, with_file("chat_template.jinja", template), "template")
    return table


def config_faults() -> Table:
    """Values of another type."""
    table = Table("checkpoint's settings")

    def add(file: str, key: str, value: object, words: str = "") -> None:
        table.add(f"{key} {value!r}", setting(file, key, value=value), words)

    for value in ("x", None, {}, "bert"):
        add("config.json", "model_type", value)
    for key in ("text_config", "vision_config", "image_token_id", "dtype"):
        for value in ("x", []):
            add("config.json", key, value)
    for key in ("patch_size", "merge_size", "temporal_patch_size"):
        for value in ("x", 0, 10**12):
            add("preprocessor_config.json", key, value, "preprocessor")
    add("preprocessor_config.json", "size", [])
    add("preprocessor_config.json", "rescale_factor", "x")
    add("preprocessor_config.json", "image_mean", "x")
    add("preprocessor_config.json", "resample", -1)
    for value in ("x", {}, 10**9, -1, [1.5], [None, "x"]):
        add("generation_config.json", "eos_token_id", value)
    return table


CHECKPOINTS = file_faults() + pickle_faults() + weight_faults() + tokenizer_faults()
CHECKPOINTS += config_faults()


def sharded(folder: Path) -> None:
    tensors = read_weights(folder)
    (folder / "model.safetensors").unlink()
    parts, where = {}, {}
    for i, name in enumerate(sorted(tensors)):
        file = f"model-0000{1 + i % 2}-of-00002.safetensors"
        parts.setdefault(file, {})[name] = tensors[name]
        where[name] = file
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def in_bf16(tensors: dict) -> dict:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def checkpoint_controls() -> Table:
    table = Table("control")
    table.add("as it is", lambda folder: None)
    table.add("weights in two shards", sharded)
    table.add("no generation_config.json", without_file("generation_config.json"))
    table.add("no tokenizer_config.json", without_file("tokenizer_config.json"))
    table.add("strange files beside it", with_file("notes.txt", b"\xff"))
    pickles = with_file("optimizer.pt", pickle.dumps(Explosive()))
    table.add("pickles beside the weights", pickles)
    table.add("no end of text named", setting("generation_config.json", "eos_token_id"))
    table.add("bf16 weights", weights(in_bf16))
    return table


CHECKPOINT_CONTROLS = checkpoint_controls()
