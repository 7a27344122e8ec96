"""What the notebooks share: the miniature's commands, how to run and how to show them.

The lessons build on each other through the folder notebooks/runs/ (git-ignored): `run` makes a part
of it unless an earlier lesson has. Importing this module moves to the repository's top, where the
scripts are.
"""

import base64
import contextlib
import functools
import importlib
import io
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image as Displayed
from IPython.display import Markdown
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"  # no progress bars in notebooks
warnings.filterwarnings("ignore", message="IProgress not found")

plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

WORK = Path("notebooks/runs")
# Where the project's own functions are: no exercise is solved by calling one of them.
PROJECT = {str(ROOT / folder) for folder in (".", "support", "assets", "notebooks/solutions")}
BASE = "assets/tiny-qwen2.5-vl"
# The whole miniature: name of the output folder -> script and flags. Seed 8 is the course's own:
# the shipped base saw the phantoms of seed 1000, the recipe was chosen on those of 500 to 504.
COMMANDS = {
    "slices": ("01_make_dataset", "--phantoms 160 --seed 8 --workers 1"),
    "zoom": ("02_zoom_augment", f"--data {WORK}/slices --workers 1"),
    "plain": ("02_zoom_augment", f"--data {WORK}/slices --no-patch --workers 1"),
    "sft": ("03_sft", f"--data {WORK}/zoom --model {BASE}"),
    "sft_full": ("03_sft", f"--data {WORK}/zoom --model {BASE} --train full"),
    "sft_plain": ("03_sft", f"--data {WORK}/plain --model {BASE}"),
    "grpo": ("04_grpo", f"--data {WORK}/zoom --model {WORK}/sft"),
    "eval": (
        "05_eval",
        f"--data {WORK}/zoom --model {BASE} {WORK}/sft {WORK}/grpo --swap-thinking --overwrite",
    ),
    # Lesson 6. Half of the demo's 200 steps of GRPO: the course is to take minutes.
    "clean": ("02_zoom_augment", f"--data {WORK}/slices --clean --workers 1"),
    "locate_sft": ("03_sft", f"--task locate --data {WORK}/clean --model {BASE}"),
    "locate": (
        "04_grpo",
        f"--task locate --prompt direct --steps 100 --data {WORK}/clean --model {WORK}/locate_sft",
    ),
    "where": (
        "05_eval",
        f"--task locate --think no --data {WORK}/clean "
        f"--model {BASE} {WORK}/locate_sft {WORK}/locate --overwrite",
    ),
    # 02 --boxes takes one answer per record: those of one model under one prompt form.
    "boxes": (
        "05_eval",
        f"--task locate --think no --data {WORK}/clean --model {WORK}/locate --overwrite",
    ),
    "predicted": (
        "02_zoom_augment",
        f"--data {WORK}/slices --boxes {WORK}/boxes/boxes.jsonl --workers 1",
    ),
    "whole": ("02_zoom_augment", f"--data {WORK}/slices --whole --workers 1"),
    "jitter_0.7": ("02_zoom_augment", f"--data {WORK}/slices --jitter 0.7 --workers 1"),
    "jitter_0.5": ("02_zoom_augment", f"--data {WORK}/slices --jitter 0.5 --workers 1"),
    "jitter_0.3": ("02_zoom_augment", f"--data {WORK}/slices --jitter 0.3 --workers 1"),
    "jitter_0": ("02_zoom_augment", f"--data {WORK}/slices --jitter 0 --workers 1"),
}
# How the diagnosis models of "eval" do on the other boxes.
for name in ("predicted", "whole"):
    flags = f"--data {WORK}/{name} --model {WORK}/sft {WORK}/grpo --no-skill --overwrite"
    COMMANDS[f"eval_{name}"] = ("05_eval", flags)
for name in ("jitter_0.7", "jitter_0.5", "jitter_0.3", "jitter_0"):
    flags = f"--data {WORK}/{name} --model {WORK}/grpo --think yes --no-skill --overwrite"
    COMMANDS[f"eval_{name}"] = ("05_eval", flags)
# What a stage writes when it is done.
LAST_FILE = ("dataset_info.json", "config.json", "metrics.json")


def stage(script: str, *flags: str, quiet: bool = False) -> None:
    """Runs a numbered script in this process, as `python <script>.py <flags>`, without its bars.

    `quiet` also hides what it prints: 05's tables, which a lesson shows from table.md.
    """
    print(f"$ python {script}.py {' '.join(flags)}")
    printed = contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext()
    try:
        with contextlib.redirect_stderr(io.StringIO()), printed:
            importlib.import_module(script).main(list(flags))
    except SystemExit as error:  # bad input: the script's one-line message
        raise RuntimeError(error.code) from None


def run(name: str) -> Path:
    """The folder of the command `name` in COMMANDS; it and what it needs are made if missing."""
    folder, (script, flags) = WORK / name, COMMANDS[name]
    if any((folder / file).exists() for file in LAST_FILE):
        print(f"{folder}: made before; delete it to make it again")
        return folder
    for word in flags.split():
        if word.startswith(f"{WORK}/"):
            run(Path(word).relative_to(WORK).parts[0])
    stage(script, *flags.split(), "--out", str(folder), quiet=script == "05_eval")
    return folder


def show(path: Path, width: int = 1000) -> Displayed:
    """A picture file as a cell's output, at most `width` px wide, in 128 colours: small.

    The octree keeps the few bright colours of boxes among all the gray.
    """
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((width, width))
    buffer = io.BytesIO()
    picture.quantize(128, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return Displayed(buffer.getvalue())


def table(header: list, rows: list) -> Markdown:
    """A Markdown table; floats are shown with three decimals."""
    lines = []
    for row in [header, *rows]:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|---" * len(header) + "|")
    return Markdown("\n".join(lines))


def save_plots() -> None:
    """Writes the slides' pictures, plots/<lesson>_<cell>.png, from the lessons' saved outputs."""
    for page in Path("notebooks/slides").glob("*.md"):
        for lesson, cell in re.findall(r"plots/(\d_[a-z]+)_([\w-]+)\.png", page.read_text("utf-8")):
            notebook = json.loads(Path(f"notebooks/{lesson}.ipynb").read_text("utf-8"))
            outputs = next(c["outputs"] for c in notebook["cells"] if c["id"] == cell)
            pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
            for picture in pictures:
                path = page.parent / "plots" / f"{lesson}_{cell}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(base64.b64decode(picture))


def guarded(function, title: str, folder: str) -> Callable:
    """`function`, the answer to `title`: a call raises AssertionError unless the code is one's own.

    It must come from a file in `folder`, where the kernel keeps a notebook's cells, and no function
    of the project may run within it: neither under another name, nor from a module loaded anew or
    a text, nor in a thread.
    """
    real = functools.lru_cache(os.path.realpath)  # a module's path may hold ".." or a link

    def call(*args, **kwargs):
        code = getattr(function, "__code__", None)
        written = code is not None and os.path.dirname(code.co_filename) == folder
        assert written, "write the function in the cell above, with def"
        borrowed = []

        def watch(frame, event, _):
            if event != "call":
                return
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.startswith("<"):  # no file, such as a text that exec was given
                own = name != title
            else:
                own = os.path.dirname(real(file)) not in PROJECT
            if not own:
                borrowed.append(f"{name} of {os.path.basename(file)}")

        before = sys.getprofile(), threading.getprofile()
        sys.setprofile(watch)
        threading.setprofile(watch)  # of threads that begin within
        try:
            result = function(*args, **kwargs)
            assert sys.getprofile() is watch, "leave the profiler alone: write it yourself"
        finally:
            sys.setprofile(before[0])
            threading.setprofile(before[1])
        assert not borrowed, f"it calls {borrowed[0]}: write it yourself"
        return result

    return call


def keep_grade(exercise: str, points: int, of: int, failed: list[str]) -> None:
    """Puts an exercise's last grade into grades.json, which appears whole or not at all."""
    from support.files import write_atomic  # here: the path to it is set above

    path = WORK / "grades.json"
    grades = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    grades[exercise] = {"points": points, "of": of, "failed": failed}
    write_atomic(path, json.dumps(grades, indent=1, sort_keys=True) + "\n")


def failures(checks: tuple[Callable[[], None], ...]) -> list[str]:
    """Runs checks, prints how each went, with a hint for one that raises, and names those."""
    failed = []
    for check in checks:
        try:
            check()
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            print(f"[ ] {check.__doc__}\n      hint: {kind}{error}")
            failed.append(check.__doc__)
        else:
            print(f"[x] {check.__doc__}")
    return failed


def grade(exercise: str, functions: str, *checks: Callable[[], None]) -> None:
    """Runs the checks of `exercise`, one point each; one that raises shows its hint.

    The first is the plain case. Until it passes, nothing earns a point: many a check is about what
    must *not* be found, which a function that finds nothing would pass.
    While they run, each of `functions` (names with spaces between them) is `guarded`. The result
    also goes to grades.json. Raises AssertionError unless all checks pass.
    """
    notebook = checks[0].__globals__
    folder = os.path.dirname(checks[0].__code__.co_filename)
    solved = {name: notebook.get(name) for name in functions.split()}
    try:
        for name, function in solved.items():
            notebook[name] = guarded(function, name, folder)
        failed = failures(checks)
    finally:
        notebook.update(solved)
    points = 0 if checks[0].__doc__ in failed else len(checks) - len(failed)
    print(f"{points} of {len(checks)} points")
    keep_grade(exercise, points, len(checks), failed)
    assert not failed, "not solved yet: the hints are above"
