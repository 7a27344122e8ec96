import json
import re


def read_box(completion: str, size: tuple[int, int]) -> list[int] | None:
    """The box of the single <answer> pair, px, or None."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    pair = re.search(r"<answer>(.*)</answer>", completion, re.DOTALL)
    if pair is None or pair.group(1).count('"bbox_2d"') != 1:
        return None
    try:
        found = json.loads(pair.group(1))
    except ValueError:
        return None
    box = found.get("bbox_2d") if isinstance(found, dict) else None
    if not isinstance(box, list) or [type(edge) for edge in box] != [int] * 4:
        return None
    x1, y1, x2, y2 = box
    width, height = size
    return box if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height else None


def iou(a: list[int], b: list[int]) -> float:
    """The area that two boxes share, of the area that they cover together."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return shared / (area_a + area_b - shared)
