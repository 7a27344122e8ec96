"""The course: notebooks are whole and small, exercises fail as stubs and pass when solved.

Hints are to the point; and (slow) every lesson and the FAQ run without an error from a clean copy.
"""

import re
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="pip install -r notebooks/requirements.txt")
pytest.importorskip("ipykernel", reason="pip install -r notebooks/requirements.txt")
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "notebooks"
LESSONS = ["1_dataset", "2_zoom", "3_sft", "4_grpo", "5_evaluation", "faq"]
EXERCISES = ["1_boxes", "2_split", "3_parser", "4_loss", "5_block_mask"]


def cells(path: Path, tag: str | None = None) -> list[str]:
    """The code cells of a notebook, all or those with a tag."""
    found = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    if tag is not None:
        found = [cell for cell in found if tag in cell.metadata.get("tags", [])]
    return [cell.source for cell in found]


# ==== what is committed ====


@pytest.mark.parametrize("name", LESSONS)
def test_committed_lesson_was_run_once_from_top_to_bottom_and_is_small(name):
    path = COURSE / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    data = [output.get("data", {}) for output in outputs]
    assert any("image/png" in one for one in data) or name == "faq"
    texts = [output.get("text", "") for output in outputs]
    texts += [one.get("text/plain", "") for one in data]
    folder = re.compile(r"/(home|root|tmp|Users)/")  # of a person's own
    assert not any(folder.search(text) for text in texts)


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_comes_without_outputs_and_without_its_solution(name):
    notebook = nbformat.read(COURSE / "exercises" / f"{name}.ipynb", 4)
    assert not any(c.get("outputs") for c in notebook.cells)
    stub = cells(COURSE / "exercises" / f"{name}.ipynb", "stub")
    assert len(stub) == 1 and "NotImplementedError" in stub[0]


def test_the_course_page_links_to_files_that_exist_and_to_all_notebooks():
    linked = re.findall(r"\]\(([^)#:]+)\)", (COURSE / "README.md").read_text(encoding="utf-8"))
    assert all((COURSE / link).exists() for link in linked)
    files = [*COURSE.glob("*.ipynb"), *COURSE.glob("exercises/*.ipynb")]
    found = [path.relative_to(COURSE).as_posix() for path in files]
    assert set(found) <= set(linked) and len(found) == len(LESSONS) + len(EXERCISES)


# ==== exercises ====


def solve(name: str, monkeypatch, code: str | None = None) -> None:
    """Runs an exercise's cells with `code` in place of the stub."""
    monkeypatch.syspath_prepend(COURSE)
    monkeypatch.chdir(ROOT)
    path, names = COURSE / "exercises" / f"{name}.ipynb", {}
    stub = cells(path, "stub")[0]
    for source in cells(path):
        exec(code if source == stub and code is not None else source, names)


def solution(name: str) -> str:
    return (COURSE / "solutions" / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXERCISES)
def test_stub_fails_every_check(name, monkeypatch, capsys):
    with pytest.raises(AssertionError, match="not solved yet"):
        solve(name, monkeypatch)
    told = capsys.readouterr().out
    assert "0 of " in told and "replace this line by your code" in told


@pytest.mark.parametrize("name", EXERCISES)
def test_solution_passes(name, monkeypatch):
    solve(name, monkeypatch, solution(name))


LOSS = "torch.min(rho * A, rho.clamp(1 - delta, 1 + delta) * A)"
# A usual mistake, made by changing the solution in one place, and a word of the hint for it.
MISTAKES = [
    ("1_boxes", ", np.ones((3, 3))", "", "structure of ones"),
    ("1_boxes", "> min_area", ">= min_area", "'above' is >"),
    ("1_boxes", "for y, x in", "for x, y in", "swapped"),
    ("1_boxes", "x.stop, y.stop", "x.stop - 1, y.stop - 1", "one more"),
    ("1_boxes", "(-area(box), box)", "area(box)", "largest first"),
    ("1_boxes", "(-area(box), box)", "(-area(box), box[1])", "from the left"),
    (
        "2_split",
        'sorted({record["patient"] for record in records})',
        'list(dict.fromkeys(record["patient"] for record in records))',
        "sort the patients",
    ),
    (
        "2_split",
        "random.Random(seed).shuffle",
        "random.seed(seed); random.shuffle",
        "global generator",
    ),
    ("2_split", "min(max(count, 1), len(patients) - 1)", "count", "neither side may be empty"),
    ("2_split", "Random(seed)", "Random(0)", "use the seed"),
    (
        "2_split",
        "round(test_fraction * len(patients))",
        "round(test_fraction * len(records))",
        "count patients",
    ),
    ("3_parser", ", re.DOTALL", "", "DOTALL"),
    ("3_parser", ".casefold().split()", ".split()", "case-folded"),
    ("3_parser", '.removesuffix(".")', "", "trailing period"),
    ("3_parser", '.removesuffix(".")', '.rstrip(".")', "One period"),
    (
        "3_parser",
        "{name.casefold(): name for name in CLASSES}.get(text)",
        "next((name for name in CLASSES if name.casefold() in text), None)",
        "learns to name all seven",
    ),
    ("3_parser", "<answer>(.*)</answer>", "(.*)", "Take the text between"),
    (
        "3_parser",
        """if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    pair = re.search(r"<answer>(.*)</""",
        'pair = re.search(r"<answer>(.*?)</',
        "count the tags",
    ),
    ("4_loss", "reward.std(1, keepdim=True)", "reward.std(1, keepdim=True, correction=0)", "N - 1"),
    ("4_loss", " + 1e-4", "", "add 1e-4"),
    ("4_loss", "reward.mean(1, keepdim=True)", "reward.mean()", "along dim 1"),
    ("4_loss", "-torch.min", "torch.min", "the sign"),
    ("4_loss", "torch.min", "torch.max", "wanted -1.2"),
    (
        "4_loss",
        LOSS,
        "(rho.clamp(1 - delta, 1 + delta) * A)",
        "below the range",
    ),
    ("4_loss", LOSS, "(rho.clamp(max=1 + delta) * A)", "only then the minus"),
    (
        "4_loss",
        "(logp - old_logp).exp()",
        "(logp - old_logp).exp().detach() + 0 * logp",
        "no detach",
    ),
    ("5_block_mask", "seen.tril()", "seen", "tril"),
    ("5_block_mask", "(block[:, None] == block) |", "(block[:, None] >= block) |", "block numbers"),
    ("5_block_mask", " | (block == 0)", "", "sees the whole prompt"),
    ("5_block_mask", " & allowed[:, None]", " & torch.ones_like(allowed)[:, None]", "prompt_mask"),
    ("5_block_mask", "seen | torch.eye(P + N * L, dtype=torch.bool)", "seen", "NaN"),
    ("5_block_mask", ")[:, None]\n", ")\n", r"\[B, 1, T, T\]"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "hint"), MISTAKES)
def test_a_usual_mistake_meets_its_hint(name, right, wrong, hint, monkeypatch, capsys):
    assert right in solution(name)
    with pytest.raises(AssertionError, match="not solved yet"):
        solve(name, monkeypatch, solution(name).replace(right, wrong))
    assert re.search(hint, capsys.readouterr().out)


# ==== every lesson, for real ====


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project's files in a folder of their own, without anything that a run has left."""
    target = tmp_path_factory.mktemp("course") / "project"
    left = ".git .venv venv data runs __pycache__ .*_cache *.tmp".split()
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*left))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_lesson_runs_without_an_error(copy, name):
    """In the order of LESSONS, each finds what the ones before have made; alone, it makes that."""
    folder = copy / "notebooks"
    notebook = nbformat.read(folder / f"{name}.ipynb", 4)
    began = time.perf_counter()
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place)
    client.execute()  # raises CellExecutionError for any error
    print(f"{name}: {time.perf_counter() - began:.0f} s")
