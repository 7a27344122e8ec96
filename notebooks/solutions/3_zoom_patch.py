import math

from PIL import Image


def crop_square(size: tuple[int, int], box: list[int], margin: float) -> tuple[int, int, int, int]:
    """The square around `box` that the patch shows, (x0, y0, x1, y1)."""
    longest = max(box[2] - box[0], box[3] - box[1])
    side = min(math.ceil(longest * (1 + 2 * margin)), min(size))
    x = min(max((box[0] + box[2] - side) // 2, 0), size[0] - side)
    y = min(max((box[1] + box[3] - side) // 2, 0), size[1] - side)
    return x, y, x + side, y + side


def zoom_patch(
    picture: Image.Image, box: list[int], side: int, margin: float, border: float
) -> Image.Image:
    """The framed patch, RGB, side x side px."""
    width = max(1, round(border * side))
    inner = side - 2 * width
    crop = picture.convert("RGB").crop(crop_square(picture.size, box, margin))
    framed = Image.new("RGB", (side, side), (0, 255, 0))
    framed.paste(crop.resize((inner, inner), Image.Resampling.BICUBIC), (width, width))
    return framed
