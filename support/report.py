"""report.html: the tables, figures and cases of an evaluation on one page that needs nothing else.

The page is the template report.html beside this file; its script builds everything from one block
of JSON data. What models wrote is hostile until shown otherwise, so three walls stand between it
and the browser: the block is escaped and cannot end its own element, the script sets text as text
and never as HTML, and the page's Content-Security-Policy runs the template's own script and style
alone (by their hashes) and forbids the network.
"""

import html
import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from support.files import open_picture, read_bytes, write_atomic
from support.tables import Table

TEMPLATE = Path(__file__).with_suffix(".html")
# json.dumps escapes what is not ASCII, U+2028 too.
ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}
BUDGET = 50_000_000  # characters of slice pictures in a page: a browser opens such a page at once


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


def _jpeg(path: Path) -> str:
    """The picture as a small JPEG, in base64; colour is kept whole, or the red box would smear."""
    buffer = io.BytesIO()
    picture = open_picture(path).convert("RGB")
    picture.save(buffer, "JPEG", quality=80, subsampling=0, optimize=True)
    return _base64(buffer.getvalue())


def _policy(page: str) -> str:
    """The policy under which the template's own style and script run, and nothing else does."""
    hashes = []
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        hashes.append(_base64(sha256(text.encode()).digest()))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def write_report(
    path: Path, title: str, tables: list[Table], figures: dict[str, Path], cases: list[dict]
) -> None:
    """Writes the page, whole or not at all. Raises BadInput when a picture cannot be read.

    figures: PNGs by caption. cases: per answer its line of predictions.jsonl, image (Path), prompt
    and thinking; answers to one slice share its id and image. Where the pictures of all slices
    would pass BUDGET (by the size of the first), an even selection is kept, and the page says so.
    """
    images = list(dict.fromkeys(case["image"] for case in cases))
    room = min(len(images), max(1, BUDGET // len(_jpeg(images[0]))))
    images = [images[i * len(images) // room] for i in range(room)]
    places = {image: place for place, image in enumerate(images)}
    prompts, rows = {}, []
    for case in cases:
        if case["image"] in places:
            prompt = prompts.setdefault(case["prompt"], len(prompts))
            rows.append(case | {"prompt": prompt, "image": places[case["image"]]})
    data = {"tables": tables, "cases": rows, "prompts": list(prompts)}
    data["figures"] = [[caption, _base64(read_bytes(png))] for caption, png in figures.items()]
    data["pictures"] = [_jpeg(image) for image in images]
    data["total"] = len({case["id"] for case in cases})
    page = TEMPLATE.read_text(encoding="utf-8")
    block = json.dumps(data).translate(ESCAPES)
    fill = {"policy": _policy(page), "title": html.escape(title), "data": block}
    write_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda place: fill[place[1]], page))
