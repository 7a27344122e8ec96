"""The log of a run, one JSON object per line, and the curves drawn from it."""

import io
import json
import math
from pathlib import Path

from support.files import read_bytes, write_atomic, writing


class Log:
    """Appends rows to a file; on resume, rows after the resumed step are dropped. Rank 0 only."""

    def __init__(self, path: Path, steps_done: int, world):
        self.path, self.world = path, world
        if world.main:
            lines = []
            for row in read_log(path) if steps_done else []:
                if row.get("step", math.inf) <= steps_done:
                    lines.append(json.dumps(row) + "\n")
            write_atomic(path, "".join(lines))

    def write(self, *rows: dict) -> None:
        """Appends one line per row."""
        if self.world.main:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read_log(path: Path) -> list[dict]:
    """The rows of a metrics or rollout file up to the first that is none: a kill cuts one short."""
    rows = []
    for line in read_bytes(path).splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # of JSON or of UTF-8
            break
        step = row.get("step", 0) if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 2**31:
            break
        rows.append(row)
    return rows


def numbers(rows: list[dict], key: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a metric; what is no number is left out."""
    pairs = []
    for row in rows:
        value = row.get(key)
        if isinstance(value, (int, float)) and abs(value) < 1e300:  # NaN is not
            pairs.append((row.get("step", 0), value))
    return pairs


def save_figure(path: Path, figure) -> None:
    """A matplotlib figure as a PNG file: the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def draw_box(axis, box: list[int], colour: str) -> None:
    """The outline of a box [x0, y0, x1, y1], px, on a shown picture: pixel i covers i -+ 0.5."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    corner = x0 - 0.5, y0 - 0.5
    axis.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))


def plot_curves(out: Path, keys: list[str], smooth: int = 5) -> None:
    """Draws <out>/curves.png from <out>/metrics.jsonl: a panel per key, each step pale, the running
    mean over `smooth` steps dark."""
    from matplotlib.figure import Figure  # here: it takes most of a second to import

    rows = read_log(out / "metrics.jsonl")
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, key in zip(axes, keys, strict=False):
        pairs = numbers(rows, key)
        steps, values = [step for step, _ in pairs], [value for _, value in pairs]
        means = []
        for i in range(len(values)):
            recent = values[max(0, i - smooth + 1) : i + 1]
            means.append(sum(recent) / len(recent))
        axis.plot(steps, values, color="tab:blue", alpha=0.3)
        axis.plot(steps, means, color="tab:blue")
        axis.set_title(key.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(keys) :]:
        axis.axis("off")
    save_figure(out / "curves.png", figure)
