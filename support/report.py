"""report.html: the tables, curves, figures and cases of an evaluation on one page that needs nothing but itself.

The page is the template report.html beside this file; its script builds everything from one block of JSON data. What
models wrote is hostile until shown otherwise, so three walls stand between it and the browser: the block is escaped and
cannot end its own element, the script sets text as text and never as HTML, and the page's Content-Security-Policy runs
the template's own script and style alone (by their hashes) and forbids the network.
"""

import html
import io
import json
import math
import os
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from support.files import BadInput, open_picture, read_bytes, write_atomic
from support.train import read_log

TEMPLATE = Path(__file__).with_suffix(".html")
ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}  # json.dumps escapes what is not ASCII, U+2028 too
BUDGET = 50_000_000  # characters of slice pictures in a page: a browser opens such a page at once


def _jpeg(path: Path) -> str:
    """The picture as a small JPEG, in base64; colour is kept at full resolution, or the red box would smear."""
    buffer = io.BytesIO()
    open_picture(path).convert("RGB").save(buffer, "JPEG", quality=80, subsampling=0, optimize=True)
    return b64encode(buffer.getvalue()).decode()


def _number(value: object) -> float | None:
    """A metric to five digits; None, a gap in the curve, for what is not a finite number (JSON has no NaN)."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(f"{value:.5g}") if known else None


def _curves(runs: list[Path]) -> list[dict]:
    """Each run's name (its path below the folder that all runs share), steps, and values by metric."""
    curves, root = [], os.path.commonpath([run.resolve().parent for run in runs]) if runs else ""
    for run in runs:
        rows = read_log(run / "metrics.jsonl")
        if not rows or not all(isinstance(row, dict) and type(row.get("step")) is int for row in rows):
            raise BadInput(f"{run}/metrics.jsonl: missing, or a line without 'step'; train the run or leave it out")
        keys = dict.fromkeys(key for row in rows for key in row if key != "step")
        values = {key: [_number(row.get(key)) for row in rows] for key in keys}
        name = Path(os.path.relpath(run.resolve(), root)).as_posix()
        curves.append({"name": name, "steps": [row["step"] for row in rows], "values": values})
    return curves


def _policy(page: str) -> str:
    """The Content-Security-Policy under which the template's own style and script run, and nothing else does."""
    own = [re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("style", "script")]
    style, script = (b64encode(sha256(text.encode()).digest()).decode() for text in own)
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def write_report(path: Path, *, title: str, tables: list[tuple[str, str, list[list[str]]]], runs: list[Path],
                 figures: list[tuple[str, Path]], cases: list[dict]) -> None:  # fmt: skip
    """Writes the page, whole or not at all. Raises BadInput when a picture or a run's metrics.jsonl cannot be read.

    tables: caption, note, rows with the header first. runs: folders of 03 or 04. figures: caption, PNG. cases: one dict
    an answer: image (Path), model, mode, id, prompt, text, thinking, answer (None when invalid), truth, correct,
    rewards {format, validity, correctness}; answers to one slice share its id and image. Where the pictures of all
    slices would pass BUDGET (by the size of the first), an even selection of them is kept, and the page says so.
    """
    images = list(dict.fromkeys(case["image"] for case in cases))
    room = min(len(images), max(1, BUDGET // len(_jpeg(images[0])))) if images else 0
    images = [images[i * len(images) // room] for i in range(room)]
    places = {image: place for place, image in enumerate(images)}
    kept = [case for case in cases if case["image"] in places]
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(case["prompt"] for case in kept))}
    rows = [case | {"prompt": prompts[case["prompt"]], "image": places[case["image"]]} for case in kept]
    data = {"tables": tables, "runs": _curves(runs), "cases": rows, "total": len({case["id"] for case in cases}),
            "prompts": list(prompts), "pictures": [_jpeg(image) for image in images],
            "figures": [[caption, b64encode(read_bytes(png)).decode()] for caption, png in figures]}  # fmt: skip
    page = TEMPLATE.read_text(encoding="utf-8")
    fill = {"policy": _policy(page), "title": html.escape(title), "data": json.dumps(data).translate(ESCAPES)}
    write_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda place: fill[place[1]], page))
