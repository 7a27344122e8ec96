"""Hostile inputs: each is a valid one with a single thing wrong, and what the one-line message must then say.

Three tables, by what is damaged: VOLUMES (dataset.json, a CT or its mask; stage 01), RECORDS (a dataset folder's
metadata, pictures or dataset_info.json; stages 02 to 05) and CHECKPOINTS (a model's folder; stages 03 to 05). The
*_CONTROLS are unusual but valid, and must be accepted. test_hostile.py runs them all.
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
from pathlib import Path

import ct_fixtures as ct
import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Mutation:
    kind: str  # its family; ten or more belong to each
    name: str  # what is wrong
    apply: Callable  # damages a Volume, a Records or a checkpoint folder
    words: str = ""  # the message must hold it, beside the file's name

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


JUNK = {"null": None, "true": True, "number": 7, "fraction": 1.5, "text": "x", "list": ["x"], "object": {"x": 1}}


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


# ---------------------------------------------------------------------------------------------------------------------
# Volumes, for 01: train_1_a_1 is good, train_2_a_1 is the one to damage


@dataclass
class Volume:
    root: Path
    ct: Path
    mask: Path
    entry: dict  # of dataset.json


SHAPE = (ct.WIDTH, ct.HEIGHT, ct.DEPTH)  # of the CT's file, "LPS"
BAD = "train_2_a_1.nii.gz"


def build_volumes(root: Path, mutation: Mutation | None) -> list[str]:
    """Writes the good and the damaged volume and dataset.json under `root`; returns 01's flags."""
    good, entry = ct.add_case(root), ct.add_case(root, BAD)
    volume = Volume(root, ct.ct_path(root, BAD), ct.mask_path(root, BAD), entry)
    made = mutation.apply(volume) if mutation else None
    return ct.write_index(root, made if made and isinstance(made, list) else [good, entry])


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

    return lambda volume: rewrite(getattr(volume, which), change)


def voxels(which: str, array: np.ndarray, **fields) -> Callable:
    return lambda volume: ct.write_gz(getattr(volume, which), ct.nifti(array, ct.affine_for("LPS"), **fields)) and None


def entry(**fields) -> Callable:
    return lambda volume: volume.entry.update(fields)


def one_voxel(value: float, shape: tuple) -> np.ndarray:
    array = np.ones(shape, "f4")
    array[(-1,) * len(shape)] = value  # on a slice that is not even chosen
    return array


def replace(which: str, make: Callable[[Path], object]) -> Callable:
    def apply(volume: Volume) -> None:
        path = getattr(volume, which)
        path.unlink()
        make(path)

    return apply


def gzip_faults() -> list[Mutation]:
    rows = []
    for which in ("ct", "mask"):
        ends = {"to nothing": 0, "in gzip's header": 5, "after gzip's header": 10, "in the middle": None, "by one": -1,
                "by gzip's trailer": -8}  # fmt: skip
        flips = {"magic": 0, "method": 2, "reserved flag": 3, "in the middle": None, "checksum": -6, "length": -2}
        rows += [(f"{which} cut {name}", lambda v, w=which, n=n: cut(getattr(v, w), n), "") for name, n in ends.items()]
        rows += [
            (f"{which} flipped: {name}", lambda v, w=which, n=n: flip(getattr(v, w), n), "")
            for name, n in flips.items()
        ]
        rows += [
            (f"{which} is no gzip", replace(which, lambda p: p.write_text("plain text" * 99)), ""),
            (f"{which} with rubbish behind it", lambda v, w=which: getattr(v, w).open("ab").write(b"rubbish"), ""),
            (f"{which} ends inside", lambda v, w=which: rewrite(getattr(v, w), lambda data: data[:-2]), "truncated"),
        ]
    return [Mutation("gzip", *row) for row in rows]


def header_faults() -> list[Mutation]:
    fields = {"size": {"sizeof_hdr": 7}, "size negative": {"sizeof_hdr": -348}, "magic of a pair": {"magic": b"ni1"},
              "magic of NIfTI-2": {"magic": b"n+2"}, "no magic": {"magic": b""}, "offset nan": {"vox_offset": np.nan},
              "offset infinite": {"vox_offset": np.inf}, "offset huge": {"vox_offset": 1e30},
              "offset negative": {"vox_offset": -352}, "offset in the header": {"vox_offset": 100}}  # fmt: skip
    rows = [(f"{w} {name}", header(w, **given), "") for w in ("ct", "mask") for name, given in fields.items()]
    rows += [(f"{w} of 200 bytes", lambda v, w=w: rewrite(getattr(v, w), lambda data: data[:200]), "NIfTI-1")
             for w in ("ct", "mask")]  # fmt: skip
    rows += [(f"{w} of ones", lambda v, w=w: rewrite(getattr(v, w), lambda data: b"\xff" * 400), "NIfTI-1")
             for w in ("ct", "mask")]  # fmt: skip
    return [Mutation("NIfTI header", *row) for row in rows]


def dimension_faults() -> list[Mutation]:
    dims = {"30,000 cubed": [3, 30000, 30000, 30000, 1, 1, 1, 1], "32,767 to the fourth": [4, *[32767] * 4, 1, 1, 1],
            "seven axes": [7, *[32767] * 7], "one long axis": [4, 32767, 48, 12, 32767, 1, 1, 1],
            "zero": [3, 40, 0, 12, 1, 1, 1, 1], "negative": [3, 40, -48, 12, 1, 1, 1, 1],
            "no axis": [0, 40, 48, 12, 1, 1, 1, 1], "nine axes": [9, 40, 48, 12, 1, 1, 1, 1],
            "minus one axis": [-1, 40, 48, 12, 1, 1, 1, 1]}  # fmt: skip
    rows = [(f"{w} {name}", header(w, dim=dim), "") for w in ("ct", "mask") for name, dim in dims.items()]

    def both(volume: Volume) -> None:
        header("ct", dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])(volume)
        volume.entry["shape"] = [1000, 1000, 1000]

    rows.append(("ct and dataset.json agree on a gigabyte", both, "asks for"))
    return [Mutation("dimensions", *row) for row in rows]


def dtype_faults() -> list[Mutation]:
    codes = {"complex64": (32, 64), "complex128": (1792, 128), "complex256": (2048, 256), "RGB": (128, 24),
             "RGBA": (2304, 32), "bits": (1, 1), "none": (0, 0), "unknown": (999, 16), "below 0": (-3, 16)}  # fmt: skip
    rows = [(f"{w} {name}", header(w, datatype=code, bitpix=bits), "")
            for w in ("ct", "mask") for name, (code, bits) in codes.items()]  # fmt: skip
    rows += [(f"{w} claims float64", header(w, datatype=64, bitpix=64), "truncated") for w in ("ct", "mask")]
    return [Mutation("dtype", *row) for row in rows]


def number_faults() -> list[Mutation]:
    rows = []
    for name, value in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}.items():
        rows += [
            (f"ct voxel {name}", voxels("ct", one_voxel(value, SHAPE)), "non-finite"),
            (f"mask voxel {name}", voxels("mask", one_voxel(value, (1, *SHAPE))), "non-finite"),
            (f"affine {name}", header("ct", srow_x=[value, 0, 0, 0]), "affine"),
            (f"affine's shift {name}", header("ct", srow_z=[0, 0, 2, value]), "affine"),
            (f"intercept {name}", header("ct", scl_inter=value), ""),
            (f"mask's intercept {name}", header("mask", scl_inter=value), ""),
            (f"quaternion {name}", header("ct", sform_code=0, qform_code=1, quatern_b=value), ""),
            (f"voxel size {name}", header("ct", sform_code=0, qform_code=1, pixdim=[1, value, 1, 1, 1, 1, 1, 1]), ""),
        ]
        if value != value:
            continue  # a slope of NaN means "not scaled", as 0 does
        rows += [
            (f"slope {name}", header("ct", scl_slope=value), "non-finite"),
            (f"mask's slope {name}", header("mask", scl_slope=value), "non-finite"),
        ]
    rows += [
        ("affine zero", header("ct", srow_x=[0, 0, 0, 0]), "affine"),
        ("affine flat", header("ct", srow_x=[1, 0, 0, 0], srow_z=[1, 0, 0, 0]), "affine"),
        ("no orientation", header("ct", sform_code=0), "orientation"),
    ]
    return [Mutation("NaN, inf and affine", *row) for row in rows]


def shape_faults() -> list[Mutation]:
    w, h, d = SHAPE
    ct_shapes = [(w,), (w, h), (w * h, d), (1, *SHAPE), (*SHAPE, 2), (2, *SHAPE), (*SHAPE, 1, 2), (w, h, d + 1)]
    ct_shapes += [s for s in itertools.permutations(SHAPE) if s != SHAPE]
    mask_shapes = [(w,), (w, h), (w * h, d), (2, *SHAPE), (w, 1, h, d), (*SHAPE, 2), (1, *SHAPE, 2), (1, w, h, d + 1)]
    mask_shapes += [(1, *s) for s in itertools.permutations(SHAPE) if s != SHAPE]
    rows = [(f"ct {s}", voxels("ct", np.zeros(s, "i2")), "shape") for s in ct_shapes]
    rows += [(f"mask {s}", voxels("mask", np.ones(s, "u1")), "finding") for s in mask_shapes]
    return [Mutation("2-D to 5-D and swapped axes", *row) for row in rows]


def entry_faults() -> list[Mutation]:
    rows = [(f"{field} {name}", entry(**{field: value}), f"'{field}'")
            for field, kind in {"name": str, "findings": dict, "categories": dict, "shape": list, "pixels": dict,
                                "entity_counts": dict, "protocol": str}.items()
            for name, value in other_types(kind).items()]  # fmt: skip
    shapes = {"short": [40, 48], "fractions": [40.0, 48, 12], "booleans": [True, 48, 12], "zero": [0, 48, 12],
              "negative": [-40, 48, 12], "endless": [10**30, 48, 12], "of terabytes": [4096, 4096, 4096],
              "nested": [[40], 48, 12], "not the CT's": [48, 40, 12]}  # fmt: skip
    rows += [(f"shape {name}", entry(shape=shape), "shape") for name, shape in shapes.items()]
    rows += [
        ("findings empty", entry(findings={}), "'findings'"),
        ("finding's key a path", entry(findings={"../0": "x"}, categories={"../0": "2b"}), "'findings'"),
        ("two findings, one in the mask", entry(findings={"0": "x", "1": "y"}, categories={"0": "2b", "1": "2b"}),
         "finding"),
    ]  # fmt: skip
    rows += [(f"finding's text {name}", entry(findings={"0": value}), "'findings'")
             for name, value in other_types(str).items()]  # fmt: skip
    rows += [(f"category {name}", entry(categories={"0": value}), "'categories'")
             for name, value in other_types(str).items()]  # fmt: skip
    rows += [(f"an entry is {name}", lambda v, x=value: [ct.add_case(v.root), x], "not a JSON object")
             for name, value in other_types(dict).items()]  # fmt: skip
    return [Mutation("dataset.json entry", *row) for row in rows]


def category_faults() -> list[Mutation]:
    codes = ["9z", "", "2B", "2b ", "b2", "Emphysema", "1", "2b\n", "é", "1a/1b", "x" * 5000]
    rows = [(f"{code!r:.12}", entry(categories={"0": code}), "unknown category") for code in codes]
    return [Mutation("unknown category", *row) for row in rows]


def name_faults() -> list[Mutation]:
    names = [f"../{BAD}", f"/etc/{BAD}", f"a/{BAD}", f"{BAD}\n", f"\0{BAD}", "train_٣_a_1.nii.gz", "..", "", ".",
             "brain.nii.gz", BAD.removesuffix(".gz"), "TRAIN_2_a_1.nii.gz", "train_2_../x_1.nii.gz",
             "x" * 10_000]  # fmt: skip
    rows = [(f"name {name!r:.24}", entry(name=name), "'name'") for name in names]

    def duplicate(volume: Volume) -> list:
        good = ct.add_case(volume.root)
        return [good, {**good, "findings": {"0": "another text"}}]

    rows.append(("name twice", duplicate, "duplicate"))
    for which, words in (("ct", "no CT"), ("mask", "segmentations")):
        makes = {"missing": lambda p: None, "a folder": Path.mkdir, "a pipe": os.mkfifo,
                 "a dangling link": lambda p: p.symlink_to("nowhere"), "a link to itself": lambda p: p.symlink_to(p),
                 "a link to an endless file": lambda p: p.symlink_to("/dev/zero")}  # fmt: skip
        rows += [(f"{which} is {name}", replace(which, make), words) for name, make in makes.items()]
    rows.append(("mask empty", voxels("mask", np.zeros((1, *SHAPE), "u1")), "empty mask"))
    return [Mutation("names, links and missing files", *row) for row in rows]


def index_faults() -> dict[str, bytes]:
    """Content of a dataset.json that is of no use at all."""
    texts = {name: json.dumps(value).encode() for name, value in JUNK.items()}
    texts |= {f"train {name}": json.dumps({"train": value}).encode() for name, value in other_types(list).items()}
    texts |= {"empty": b"", "cut": b'{"train": [', "deep": b"[" * 100_000, "not UTF-8": b"\xff\xfe{}",
              "nul": b"\0" * 99, "only test": b'{"test": []}'}  # fmt: skip
    return texts


def write_raw_index(content: bytes) -> Callable:
    """The damage has to come after dataset.json was written: see test_hostile.py."""
    return lambda index: index.write_bytes(content)


INDEXES = [Mutation("dataset.json", name, write_raw_index(text), "dataset.json")
           for name, text in index_faults().items()]  # fmt: skip
VOLUMES = [*gzip_faults(), *header_faults(), *dimension_faults(), *dtype_faults(), *number_faults(), *shape_faults(),
           *entry_faults(), *category_faults(), *name_faults()]  # fmt: skip


def two_members(volume: Volume) -> None:
    data = gzip.decompress(volume.ct.read_bytes())
    volume.ct.write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))


VOLUME_CONTROLS = [
    Mutation("control", *row)
    for row in [
        ("as it is", lambda v: None),
        *[(f"ct of {t}", voxels("ct", np.ones(SHAPE, t))) for t in ("u1", "i2", ">i2", "u2", "i4", "f4", "f8")],
        *[(f"mask of {t}", voxels("mask", np.ones((1, *SHAPE), t))) for t in ("u1", "i2", ">i4", "f4", "f8")],
        ("a 3-D mask", voxels("mask", np.ones(SHAPE, "u1"))),
        ("finding axis last", voxels("mask", np.ones((*SHAPE, 1), "u1"))),
        ("gzip in two members", two_members),
        ("slope nan: not scaled", header("ct", scl_slope=np.nan)),
        ("a qform only", header("ct", sform_code=0, qform_code=1)),
        ("the mask's own affine is nan", header("mask", srow_x=[np.nan, 0, 0, 0])),
        ("optional fields missing", lambda v: [v.entry.pop(f) for f in ("pixels", "entity_counts", "protocol")][:0]),
        ("unknown fields", entry(reader={"name": "x"}, pages=[1])),
        ("a text of another script", entry(findings={"0": "磨玻璃影 \u202e <b>\n"})),
        ("ct is a link", lambda v: v.ct.symlink_to(v.ct.rename(v.root / "ct_rate" / "away"))),
    ]
]


# ---------------------------------------------------------------------------------------------------------------------
# Records, for 02 (a folder of 01) and for 03 to 05 (a folder of 02)


@dataclass
class Records:
    """A dataset folder; its first training record is the one to damage."""

    folder: Path

    @property
    def metadata(self) -> Path:
        return self.folder / "train" / "metadata.jsonl"

    def lines(self) -> list[str]:
        return self.metadata.read_text().splitlines()

    @property
    def picture(self) -> Path:
        return self.folder / "train" / json.loads(self.lines()[0])["file_name"]


FIELDS = {"file_name": str, "id": str, "label": str, "question": str, "answer": str, "box": list, "volume": str,
          "patient": str, "category": str, "text": str, "slice": int, "finding": int, "boxes": list}  # fmt: skip


def first_line(change: Callable[[dict, list[str]], str]) -> Callable:
    def apply(records: Records) -> None:
        lines = records.lines()
        lines[0] = change(json.loads(lines[0]), lines)
        records.metadata.write_text("\n".join(lines) + "\n")

    return apply


def record(**fields) -> Callable:
    return first_line(lambda old, lines: json.dumps({**old, **fields}))


def without(field: str) -> Callable:
    return first_line(lambda old, lines: json.dumps({key: value for key, value in old.items() if key != field}))


def record_faults() -> list[Mutation]:
    rows = [(f"{field} {name}", record(**{field: value}), f"'{field}'")
            for field, kind in FIELDS.items() for name, value in other_types(kind).items()]  # fmt: skip
    rows += [(f"{field} missing", without(field), f"'{field}'") for field in list(FIELDS)[:6]]
    return [Mutation("metadata field", *row) for row in rows]


def line_faults() -> list[Mutation]:
    texts = {"empty": "", "blank": "   ", "cut": '{"id": "x', "number": "5", "text": '"x"', "null": "null",
             "list": "[]", "empty object": "{}", "nul": "\0", "deep": "[" * 100_000, "NaN": "NaN", "two": "{} {}",
             "digits": "9" * 10_000, "a comment": "# {}", "single quotes": "{'id': 'x'}"}  # fmt: skip
    rows = [(name, first_line(lambda old, lines, t=text: t), "line 1") for name, text in texts.items()]

    def not_utf8(records: Records) -> None:
        records.metadata.write_bytes(b'{"id": "\xff"}\n' + records.metadata.read_bytes())

    rows.append(("not UTF-8", not_utf8, "line 1"))
    return [Mutation("metadata line", *row) for row in rows]


def link(target: str) -> Callable:
    def apply(records: Records) -> None:
        picture = records.picture
        (records.folder.parent / "outside.png").write_bytes(picture.read_bytes())
        picture.unlink()
        picture.symlink_to(target)

    return apply


def path_faults() -> list[Mutation]:
    names = ["../../outside.png", "/etc/hostname", "", ".", "..", "images/\0.png", "images/none.png", "images",
             "x" * 10_000, "images/../../../outside.png"]  # fmt: skip
    rows = [(f"file_name {name!r:.30}", record(file_name=name), "line 1") for name in names]
    rows += [(f"picture links to {to}", link(to), "line 1") for to in ("../../../outside.png", "/etc/hostname", "none")]
    rows += [
        ("the images' folder is a link", images_elsewhere, "leads out"),
        ("id empty", record(id=""), "'id'"),
        ("id twice", lambda r: r.metadata.open("a").write(r.lines()[0] + "\n"), "'id'"),
        ("metadata missing", lambda r: r.metadata.unlink(), ""),
        ("metadata a folder", lambda r: (r.metadata.unlink(), r.metadata.mkdir()), ""),
        ("metadata a pipe", lambda r: (r.metadata.unlink(), os.mkfifo(r.metadata)), ""),
    ]
    return [Mutation("paths, links and ids", *row) for row in rows]


def images_elsewhere(records: Records) -> None:
    images = records.folder / "train" / "images"
    outside = records.folder.parent / "outside"
    shutil.move(images, outside)
    images.symlink_to(outside)


def id_faults() -> list[Mutation]:
    """Ids that only 02 refuses, since it makes file names of them."""
    ids = ["../x", "a/b", "/x", ".hidden", "x" * 300, "a\nb", "..", "-x", "a b", "\0", "é"]
    return [Mutation("id as a file name", f"{name!r:.20}", record(id=name), "id") for name in ids]


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims to be this large, whatever it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def picture(content: bytes | tuple[int, int] | Callable) -> Callable:
    def apply(records: Records) -> None:
        path = records.picture
        if callable(content):
            path.write_bytes(content(path.read_bytes()))
        elif isinstance(content, tuple):
            Image.new("L", content).save(path)
        else:
            path.write_bytes(content)

    return apply


def picture_faults() -> list[Mutation]:
    contents = {
        "empty": b"", "text": b"no picture", "a script": b"<svg onload='x'/>", "PNG's signature alone": png(9, 9)[:8],
        "cut in its header": lambda data: data[:20], "cut in its data": lambda data: data[: len(data) // 2],
        "without its end": lambda data: data[:-20],
        "flipped": lambda data: data[:60] + bytes(b ^ 0xFF for b in data[60:90]) + data[90:],
        "a bomb of 60,000 x 60,000": png(60_000, 60_000), "a bomb of 2 billion px": png(2**31 - 1, 2**31 - 1),
        "a bomb that inflates": png(20_000, 20_000, bytes(2_000_000)), "4,000 px without data": png(4000, 4000),
        "no width": png(0, 40), "1 x 1": (1, 1), "27 px high": (40, 27), "20,000 px wide": (20_000, 30),
        "20,000 px high": (30, 20_000), "a PNG without pixels": png(40, 48),
    }  # fmt: skip
    rows = [(name, picture(content), "") for name, content in contents.items()]
    rows += [
        ("missing", lambda r: r.picture.unlink(), ""),
        ("a folder", lambda r: (path := r.picture, path.unlink(), path.mkdir()), ""),
        ("a pipe", lambda r: (path := r.picture, path.unlink(), os.mkfifo(path)), ""),
    ]
    return [Mutation("picture", *row) for row in rows]


def box_faults() -> list[Mutation]:
    boxes = [[], [1, 2, 3], [1, 2, 3, 4, 5], [1.0, 2, 3, 4], [False, False, True, True], ["1", "2", "3", "4"],
             [5, 5, 5, 9], [5, 9, 9, 9], [9, 5, 5, 9], [-5, 5, 5, 9], [0, 0, 10**12, 9], [0, 0, 4097, 9],
             [None] * 4, [[1, 2, 3, 4]]]  # fmt: skip
    rows = [(f"box {box}", record(box=box), "'box'") for box in boxes]
    rows += [(f"boxes hold {box!r}", record(boxes=[box]), "'box'") for box in (*boxes[1:4], "x", None, 5, {})]
    return [Mutation("box", *row) for row in rows]


def outside_faults() -> list[Mutation]:
    """Boxes beyond the picture's 40 x 48 px: 02 draws them, so it must look."""
    boxes = [[0, 0, 41, 10], [0, 0, 10, 49], [40, 0, 50, 10], [0, 48, 10, 60], [39, 47, 41, 49], [0, 0, 4096, 4096],
             [100, 100, 200, 200], [0, 47, 40, 4096], [20, 20, 30, 49], [4000, 4000, 4096, 4096]]  # fmt: skip
    kind = "box outside the picture"
    return [Mutation(kind, f"{box}", record(box=box, boxes=[box]), "does not lie") for box in boxes]


def label_faults() -> list[Mutation]:
    labels = ["Normal", "emphysema", "EMPHYSEMA", " Emphysema", "Emphysema.", "", "Emphysema\n", "Emphysema; Normal",
              "1c", "Consolidation", "<script>alert(1)</script>", "x" * 10_000]  # fmt: skip
    return [Mutation("unknown label", f"{label!r:.24}", record(label=label), "'label'") for label in labels]


def info_faults() -> tuple[list[Mutation], list[Mutation]]:
    """Faults in either stage's folder, and fields that 01's must have and 02's may lack."""

    def write(text: str | bytes) -> Callable:
        data = text if isinstance(text, bytes) else text.encode()
        return lambda records: (records.folder / "dataset_info.json").write_bytes(data)

    def field(name: str, value: object) -> Callable:
        def apply(records: Records) -> None:
            path = records.folder / "dataset_info.json"
            info = json.loads(path.read_text())
            info[name] = value
            if value is ...:
                del info[name]
            path.write_text(json.dumps(info))

        return apply

    rows = [(name, write(json.dumps(value)), "") for name, value in JUNK.items()]
    rows += [("empty", write(""), ""), ("cut", write('{"stage": "0'), ""), ("not UTF-8", write(b"\xff"), ""),
             ("deep", write("[" * 100_000), ""), ("nul", write("\0"), "")]  # fmt: skip
    rows += [(f"stage {value!r}", field("stage", value), "stage") for value in ("03", "", "1", None, 1, ["01"], ...)]
    kinds = {"phantoms": bool, "settings": dict, "records": dict, "classes": dict, "skipped": list}
    rows += [(f"{name} {what}", field(name, value), f"'{name}'")
             for name, kind in kinds.items() for what, value in other_types(kind).items()]  # fmt: skip
    rows.append(("missing", lambda r: (r.folder / "dataset_info.json").unlink(), ""))
    absent = [(f"{name} missing", field(name, ...), f"'{name}'") for name in kinds]
    return tuple([Mutation("dataset_info.json", *row[:2], row[2] or "dataset_info.json") for row in part]
                 for part in (rows, absent))  # fmt: skip


RECORDS = [*record_faults(), *line_faults(), *path_faults(), *picture_faults(), *box_faults(), *label_faults(),
           *info_faults()[0]]  # fmt: skip
RECORDS_02 = [*id_faults(), *outside_faults(), *info_faults()[1]]  # for 02 alone


def same_picture(**options) -> Callable:
    def apply(records: Records) -> None:
        path = records.picture
        Image.open(path).convert(options.pop("mode", "L")).save(path, **options)

    return apply


RECORD_CONTROLS = [
    Mutation("control", *row)
    for row in [
        ("as it is", lambda r: None),
        ("a box that fills the picture", record(box=[0, 0, 40, 48], boxes=[[0, 0, 40, 48]])),
        ("a box of one px", record(box=[39, 47, 40, 48], boxes=[[39, 47, 40, 48]])),
        *[(f"{field} missing", without(field)) for field in ("boxes", "text", "slice", "category")],
        ("unknown fields", record(reader={"name": "x"}, page=1)),
        ("a text with tags", record(text="<script>alert(1)</script> \u202e")),
        *[(f"a picture of mode {mode}", same_picture(mode=mode, format="PNG")) for mode in ("L", "RGB", "RGBA", "P")],
        ("a JPEG named .png", same_picture(format="JPEG")),
        ("lines end in CRLF", lambda r: r.metadata.write_bytes(r.metadata.read_bytes().replace(b"\n", b"\r\n"))),
        ("no end of line at the end", lambda r: r.metadata.write_bytes(r.metadata.read_bytes().rstrip(b"\n"))),
        ("a picture that is a link within the folder", lambda r: r.picture.symlink_to(
            r.picture.rename(r.picture.with_name("other.png")).name)),
    ]
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint folders, for 03 to 05


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


def weights(change: Callable[[dict], object]) -> Callable:
    def apply(folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

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
    return lambda folder: (folder / name).write_bytes(content) and None


def file_faults() -> list[Mutation]:
    """Each file of the folder missing, empty, cut or rubbish; JSON files also of another type."""
    needed = ["chat_template.jinja", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]
    rows = [(f"{name} missing", lambda f, n=name: (f / n).unlink(), "chat template" if "chat" in name else name)
            for name in needed]  # fmt: skip
    for name in [*needed, "generation_config.json", "tokenizer_config.json"]:
        words = {"chat_template.jinja": "", "model.safetensors": "safetensors"}.get(name, name)
        rows += [
            (f"{name} empty", with_file(name, b""), words),
            (f"{name} rubbish", with_file(name, b"\x80\x02rubbish"), words),
            (f"{name} cut", lambda f, n=name: cut(f / n, None), words),
            (f"{name} a folder", lambda f, n=name: ((f / n).unlink(), (f / n).mkdir()), ""),
        ]
        if name.endswith("json"):
            rows += [(f"{name} {what}", with_file(name, json.dumps(value).encode()), name)
                     for what, value in other_types(dict).items()]  # fmt: skip
            rows.append((f"{name} deep", with_file(name, b"[" * 100_000), name))
    rows.append(("all missing", lambda f: [path.unlink() for path in f.iterdir()], "config.json"))
    return [Mutation("checkpoint file", *row) for row in rows]


def weight_faults() -> list[Mutation]:
    pickles = ["pytorch_model.bin", "model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "checkpoint.pth",
               "adapter_model.bin", "optimizer.pt", "training_args.bin", "weights.pt", "consolidated.pth"]  # fmt: skip
    rows = [("checkpoint of pickles", name, pickled(name), "model.safetensors is missing") for name in pickles]
    rows.append(("checkpoint of pickles", "a pickle named model.safetensors",
                 with_file("model.safetensors", pickle.dumps(Explosive())), "safetensors"))  # fmt: skip
    kind = "weights that do not fit"
    gate = "model.layers.0.mlp.gate_proj.weight"
    settings = [("text_config", "intermediate_size", 100), ("text_config", "vocab_size", 900),
                ("text_config", "num_attention_heads", 8), ("text_config", "num_key_value_heads", 4),
                ("vision_config", "intermediate_size", 300), ("vision_config", "depth", 5),
                ("vision_config", "patch_size", 16), ("vision_config", "out_hidden_size", 64),
                ("vision_config", "spatial_merge_size", 1), ("text_config", "hidden_size", 1_000_000)]  # fmt: skip
    rows += [(kind, f"{part} {name} {value}", setting("config.json", part, name, value=value), "")
             for part, name, value in settings]  # fmt: skip
    rows += [
        (kind, "a tensor missing", weights(lambda s: s.pop(gate)), "gate_proj"),
        (kind, "a tensor of another shape", weights(lambda s: s.update({gate: s[gate][:-1].clone()})), ""),
        (kind, "a tensor transposed", weights(lambda s: s.update({gate: s[gate].T.contiguous()})), ""),
        (kind, "all tensors renamed", weights(lambda s: [s.update({"x." + k: s.pop(k)}) for k in list(s)]), ""),
        (kind, "an index without its shards", lambda f: ((f / "model.safetensors").unlink(), with_file(
            "model.safetensors.index.json", b'{"metadata": {}, "weight_map": {"a": "none.safetensors"}}')(f)), ""),
        (kind, "a shard out of the folder", lambda f: ((f / "model.safetensors").unlink(), with_file(
            "model.safetensors.index.json", b'{"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}')(f)), ""),
    ]  # fmt: skip
    return [Mutation(*row) for row in rows]


def config_faults() -> list[Mutation]:
    """Values of another type, and tokens that the tokenizer must have."""
    kind = "tokenizer"
    tokens = ["<|image_pad|>", "<|vision_start|>", "<|im_start|>", "<|im_end|>"]
    rows = [(kind, f"no {token}", token_lost(token), "") for token in tokens]
    rows += [
        (kind, "another id for the picture", setting("config.json", "image_token_id", value=5), "ids"),
        (kind, "no vocabulary", setting("tokenizer.json", "model", "vocab", value={}), ""),
        (kind, "vocabulary a list", setting("tokenizer.json", "model", "vocab", value=[]), ""),
        (kind, "no model", setting("tokenizer.json", "model"), ""),
        (kind, "added tokens of another type", setting("tokenizer.json", "added_tokens", value="x"), ""),
        (kind, "another version", setting("tokenizer.json", "version", value="x"), ""),
        (kind, "its class a list", setting("tokenizer_config.json", "tokenizer_class", value=[]), ""),
        (kind, "its padding a list", setting("tokenizer_config.json", "pad_token", value=[]), ""),
        (kind, "its length a text", setting("tokenizer_config.json", "model_max_length", value="x"), ""),
        (kind, "a template without a picture", with_file("chat_template.jinja", b"{{ messages[0].role }}"), "template"),
        (kind, "a template with an error", with_file("chat_template.jinja", b"{% for %}"), "template"),
        (kind, "a template that reaches for Python", with_file("chat_template.jinja",
            b"{{ ''.__class__.__mro__[1].__subclasses__() }}"), "template"),
    ]  # fmt: skip
    kind = "checkpoint's settings"
    rows += [(kind, f"model_type {value!r}", setting("config.json", "model_type", value=value), "")
             for value in ("x", None, {}, "bert")]  # fmt: skip
    rows += [(kind, f"{key} {value!r}", setting("config.json", key, value=value), "")
             for key in ("text_config", "vision_config", "image_token_id", "dtype") for value in ("x", [])]  # fmt: skip
    rows += [(kind, f"{key} {value!r}", setting("preprocessor_config.json", key, value=value), "preprocessor")
             for key in ("patch_size", "merge_size", "temporal_patch_size") for value in ("x", 0, 10**12)]  # fmt: skip
    others = {"size": [], "rescale_factor": "x", "image_mean": "x", "resample": -1}
    rows += [(kind, f"{key} {value!r}", setting("preprocessor_config.json", key, value=value), "")
             for key, value in others.items()]  # fmt: skip
    rows += [(kind, f"eos_token_id {value!r}", setting("generation_config.json", "eos_token_id", value=value), "")
             for value in ("x", {}, 10**9, -1, [1.5], [None, "x"])]  # fmt: skip
    return [Mutation(*row) for row in rows]


CHECKPOINTS = [*file_faults(), *weight_faults(), *config_faults()]


def sharded(folder: Path) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names, parts = sorted(state), {}
    for i, name in enumerate(names):
        parts.setdefault(f"model-0000{1 + i % 2}-of-00002.safetensors", {})[name] = state[name]
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


CHECKPOINT_CONTROLS = [
    Mutation("control", *row)
    for row in [
        ("as it is", lambda f: None),
        ("weights in two shards", sharded),
        ("no generation_config.json", lambda f: (f / "generation_config.json").unlink()),
        ("no tokenizer_config.json", lambda f: (f / "tokenizer_config.json").unlink()),
        ("strange files beside it", with_file("notes.txt", b"\xff")),
        ("pickles beside the weights", with_file("optimizer.pt", pickle.dumps(Explosive()))),
        ("no end of text named", setting("generation_config.json", "eos_token_id")),
        ("bf16 weights", weights(lambda s: s.update({k: v.bfloat16() for k, v in s.items()}))),
    ]
]
