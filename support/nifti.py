"""Reads gzipped NIfTI-1 volumes as a stream: each file is inflated once, nothing becomes float64.

A NIfTI-1 file is a 348-byte header, then the voxels in Fortran order: the first axis runs fastest,
so the file is a row of slabs along its last axis. nibabel reads the header; the voxels are read
slab by slab, because its `get_fdata()` makes a 512x512x300 CT 630 MB large, and slicing a gzipped
array inflates the file again for every slice.
"""

import gzip
import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation
from nibabel.spatialimages import HeaderDataError

from support.files import BadInput, reading

_SILENT = logging.Logger("nifti", logging.CRITICAL)  # nibabel reports each field that it repairs
_DEFLATE = 1032  # gzip's largest factor: a header that asks for more than that is lying
_DAMAGED = (EOFError, zlib.error, HeaderDataError, OverflowError)  # of gzip and of nibabel


@dataclass(frozen=True)
class Nifti:
    """A checked header."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # bytes before the first voxel
    slope: float
    inter: float
    affine: np.ndarray | None  # [4, 4], voxel indices to RAS+ mm; None: the header does not say

    def scale(self, stored: np.ndarray) -> np.ndarray:
        """The values that stored numbers stand for, slope * stored + inter: in a CT, HU."""
        if (self.slope, self.inter) == (1, 0):
            return stored
        with np.errstate(over="ignore"):  # a window, or "> 0", takes infinity for very large
            return stored * self.slope + self.inter


def read_header(path: Path) -> Nifti:
    """The header of a .nii.gz file. Raises BadInput when it is corrupt or cannot be true of it."""
    with reading(path, *_DAMAGED), np.errstate(all="ignore"):
        with gzip.open(path) as stream:
            block = stream.read(348)
        if len(block) < 348:
            raise HeaderDataError("shorter than a NIfTI-1 header")
        header = Nifti1Header(block, check=False)
        if header["sizeof_hdr"] != 348:
            raise HeaderDataError("no NIfTI-1 header: it does not begin with 348")
        header.check_fix(logger=_SILENT)
        shape = header.get_data_shape()
        dtype = header.get_data_dtype()
        slope, inter = header.get_slope_inter()
        offset = int(header["vox_offset"])
        oriented = bool(header["sform_code"] or header["qform_code"])
        affine = np.array(header.get_best_affine(), dtype=float) if oriented else None
    real = header["magic"].item() == b"n+1" and dtype.kind in "iuf"
    if not real or offset < 348 or min(shape, default=0) < 1:
        found = f"type {dtype}, shape {shape}, offset {offset}"
        raise BadInput(f"{path}: not a NIfTI-1 file of real numbers ({found})")
    if np.isinf(float(header["scl_slope"])):  # NaN and 0 mean "not scaled"
        raise BadInput(f"{path}: non-finite values: scl_slope is infinite")
    claimed = offset + math.prod(shape) * dtype.itemsize
    size = path.stat().st_size
    if claimed > size * _DEFLATE:
        claim = f"the header's shape {shape} asks for {claimed:,} bytes"
        raise BadInput(f"{path}: {claim}, but the file has only {size:,}")
    if slope is None:
        slope, inter = 1.0, 0.0
    return Nifti(path, shape, dtype, offset, slope, inter, affine)


def read_slabs(nifti: Nifti) -> Iterator[np.ndarray]:
    """Yields the stored numbers slab by slab along the last axis, each of `nifti.shape[:-1]`.

    The slabs are read-only. Raises BadInput when the file is shorter or longer than its header
    says, fails its checksum, or holds NaN or infinity.
    """
    shape = nifti.shape[:-1]
    size = math.prod(shape) * nifti.dtype.itemsize
    with reading(nifti.path, *_DAMAGED), gzip.open(nifti.path) as stream:
        stream.seek(nifti.offset)
        for _ in range(nifti.shape[-1]):
            block = stream.read(size)
            if len(block) < size:
                raise BadInput(f"{nifti.path}: truncated: fewer voxels than the header says")
            slab = np.frombuffer(block, nifti.dtype).reshape(shape, order="F")
            if nifti.dtype.kind == "f" and not np.isfinite(slab).all():
                raise BadInput(f"{nifti.path}: non-finite values (NaN or infinity)")
            yield slab
        if stream.read(1):  # reaching the end makes gzip compare its checksum
            raise BadInput(f"{nifti.path}: corrupt: more voxels than the header says")


def picture_planes(
    slabs: Iterable[np.ndarray], shape: tuple[int, ...], axis: int | None, transform: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (slice, [row, column, finding]) from the `slabs` of a file of `shape`.

    `axis` is the file's finding axis (None: it has none); `transform` turns the others into
    [slice, row, column]. Where a slab is a slice, as in CT-RATE's files, only one is held at a
    time; otherwise the whole volume is.
    """

    def turn(block: np.ndarray) -> np.ndarray:  # file axes -> [slice, row, column, finding]
        last = block[..., None] if axis is None else np.moveaxis(block, axis, -1)
        return apply_orientation(last, transform)

    target, direction = transform[-1]
    whole = None
    for i, slab in enumerate(slabs):
        if axis != 3 and target == 0:
            k = i if direction > 0 else shape[-1] - 1 - i
            yield k, turn(slab[..., None])[0]
            continue
        if whole is None:
            try:
                whole = np.empty(shape, slab.dtype, order="F")
            except MemoryError as error:
                raise BadInput(f"no memory for {shape} voxels at once") from error
        whole[..., i] = slab
    if whole is not None:
        yield from enumerate(turn(whole))
