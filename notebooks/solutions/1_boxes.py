import numpy as np
from scipy import ndimage


def find_boxes(lesion: np.ndarray, min_area: float) -> list[list[int]]:
    """Boxes [x0, y0, x1, y1] of the components of `lesion`, bool [rows, columns], largest first."""
    labels, _ = ndimage.label(lesion, np.ones((3, 3)))
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in ndimage.find_objects(labels)]

    def area(box: list[int]) -> int:
        return (box[2] - box[0]) * (box[3] - box[1])

    kept = [box for box in boxes if area(box) > min_area]
    return sorted(kept, key=lambda box: (-area(box), box))
