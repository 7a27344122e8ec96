"""The picture that the model is shown: the slice, the lesion's zoomed patch and its red box (paper, Section 3.2).

02_zoom_augment.py draws whole datasets with it, 05_eval.py --image a single slice; 02's docstring shows the layout.
"""

import math

from PIL import Image, ImageDraw

from support.files import BadInput


def crop_square(size: tuple[int, int], box: list[int], margin: float) -> tuple[int, int, int, int]:
    """The square (x0, y0, x1, y1), px, that the patch shows of a picture of `size` (width, height).

    Its side is the longer side of `box` times 1 + 2 * margin: a square, so that the anatomy is not distorted, however
    long and thin the box. It lies around the box's centre; at the picture's edge it is shifted inside; a large one
    gives up margin to fit. Only a box longer than the picture's shorter side makes it reach over that side's both edges
    alike (the crop is black there). The box is always whole inside it.
    """
    longest = max(box[2] - box[0], box[3] - box[1])
    side = math.ceil(longest * (1 + 2 * margin))
    side = min(side, max(longest, min(size)))
    corner = []
    for low, high, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        start = (low + high - side) // 2
        corner.append((length - side) // 2 if side > length else min(max(start, 0), length - side))
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def patch_side(size: tuple[int, int], patch: float) -> int:
    """The patch's side in px, its green border included: `patch` times the shorter side of the picture."""
    return round(patch * min(size))


def zoom_patch(picture: Image.Image, box: list[int], side: int, margin: float, border: float) -> Image.Image:
    """The framed patch, RGB, side x side px: a green border of `border` * side (at least 1 px) around the bicubic crop.

    The crop is resized to the space within the border, which hides nothing of it.
    """
    width = max(1, round(border * side))
    inner = side - 2 * width
    crop = picture.convert("RGB").crop(crop_square(picture.size, box, margin))
    framed = Image.new("RGB", (side, side), (0, 255, 0))
    framed.paste(crop.resize((inner, inner), Image.Resampling.BICUBIC), (width, width))
    return framed


def augment(
    picture: Image.Image, box: list[int], patch: float = 0.4, margin: float = 0.25, border: float = 0.03
) -> Image.Image:
    """A copy of `picture` (any mode, clean) as RGB, with the zoomed patch and the red location box.

    `box` is [x0, y0, x1, y1] in px, end-exclusive; `patch` a fraction of the shorter side, 0 for no patch; `margin` a
    fraction of the box's longer side, added on each side; `border` a fraction of the patch's side. The red line lies
    outside the box, on it only where the picture ends; it is drawn last, so the patch never hides it (though the patch
    may hide the lesion itself, which is then seen in the patch only). Raises BadInput for a box that is not in the
    picture and for a patch too small to see. Source: paper, Section 3.2.
    """
    width, height = picture.size
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise BadInput(f"the box {list(box)} does not lie in the picture of {width} x {height} px")
    result = picture.convert("RGB")
    if patch:
        side = patch_side(picture.size, patch)
        if side - 2 * max(1, round(border * side)) < 8:
            raise BadInput(f"a patch of {side} px leaves fewer than 8 px within its border; raise --patch")
        result.paste(zoom_patch(picture, box, side, margin, border), (0, 0))
    line = max(1, round(min(picture.size) / 256))  # 1 px on the demo's slices, 2 px on a 512 px one
    outline = (
        max(box[0] - line, 0),
        max(box[1] - line, 0),
        min(box[2] - 1 + line, width - 1),  # PIL's rectangle includes its last pixel
        min(box[3] - 1 + line, height - 1),
    )
    ImageDraw.Draw(result).rectangle(outline, outline=(255, 0, 0), width=line)
    return result
