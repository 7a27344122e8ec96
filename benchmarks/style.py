"""How dense the code is: the five scripts, rewards.py and support/, measured and held to limits.

    python benchmarks/style.py
    python benchmarks/style.py --root ../old        another checkout, such as an older commit

Prints one row per file as a Markdown table: its lines; its code lines, that is those that are not
blank, not a comment alone and not in a docstring; their mean length in characters, indentation
counted; the share of them over 100 characters; comprehensions and generator expressions per 100
code lines; marks that keep the formatter out. Then the lines of support/ and of README.md. Exit
code 1 when a limit is broken: those below, any line over 100 characters (comments and docstrings,
too), any such mark.
"""

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100  # characters in a line
UNFORMATTED = "fmt: " + "skip"
MEAN = 55.0  # mean characters in a code line of one file
SCRIPT = 480  # lines in a numbered script
SUPPORT = 3380  # lines in support/, all files together
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
HEADER = """\
| file | lines | code lines | mean length | over 100 | comprehensions per 100 | unformatted |
| --- | --- | --- | --- | --- | --- | --- |"""


@dataclass
class Style:
    """What is measured in one file; the properties are the table's columns."""

    name: str
    lines: int  # all of them
    too_long: int  # of all lines, those over WIDTH
    lengths: list[int]  # of code lines, in characters
    comprehensions: int
    skips: int

    @property
    def mean(self) -> float:
        return sum(self.lengths) / max(len(self.lengths), 1)

    @property
    def over(self) -> float:
        """Share of code lines over WIDTH, in %."""
        over = sum(length > WIDTH for length in self.lengths)
        return 100 * over / max(len(self.lengths), 1)

    @property
    def density(self) -> float:
        """Comprehensions per 100 code lines."""
        return 100 * self.comprehensions / max(len(self.lengths), 1)


def docstring_lines(tree: ast.AST) -> set[int]:
    """The numbers of the lines, from 1, that belong to docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            text = node.body[0]
            found.update(range(text.lineno, text.end_lineno + 1))
    return found


def measure(path: Path, name: str) -> Style:
    """Measures one file. Raises SyntaxError where it is not Python."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    documentation = docstring_lines(tree)
    lengths = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#") and number not in documentation:
            lengths.append(len(line))
    return Style(
        name=name,
        lines=len(lines),
        too_long=sum(len(line) > WIDTH for line in lines),
        lengths=lengths,
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree)),
        skips=source.count(UNFORMATTED),
    )


def faults(style: Style) -> list[str]:
    """The limits that a file breaks, each in a few words; an empty list where there is none."""
    found = []
    if style.mean > MEAN:
        found.append(f"mean length {style.mean:.1f}, limit {MEAN:.0f}")
    if style.too_long:
        found.append(f"{style.too_long} lines over {WIDTH} characters")
    if style.skips:
        found.append(f"{style.skips} marks {UNFORMATTED!r}")
    if style.name[0].isdigit() and style.lines > SCRIPT:
        found.append(f"{style.lines} lines, limit {SCRIPT}")
    return [f"{style.name}: {fault}" for fault in found]


def main(argv: list[str] | None = None) -> None:
    """Prints the table; exit code 1 when a limit is broken."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--root", type=Path, default=ROOT, help="what to measure (this checkout)")
    root = parser.parse_args(argv).root

    paths = [*sorted(root.glob("0*.py")), root / "rewards.py", *sorted(root.glob("support/*.py"))]
    broken = []
    support = 0
    print(HEADER)
    for path in paths:
        style = measure(path, path.relative_to(root).as_posix())
        broken += faults(style)
        if path.parent.name == "support":
            support += style.lines
        if style.lengths:
            numbers = f"{style.mean:.1f} | {style.over:.1f} % | {style.density:.1f} | {style.skips}"
            print(f"| {style.name} | {style.lines} | {len(style.lengths)} | {numbers} |")
    readme = (root / "README.md").read_text(encoding="utf-8")
    print(f"\nsupport/: {support:,} lines. README.md: {len(readme.splitlines())} lines.")
    if support > SUPPORT:
        broken.append(f"support/: {support:,} lines, limit {SUPPORT:,}")
    if broken:
        print("\n" + "\n".join(broken), file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
