import re

from rewards import CLASSES


def predicted_class(completion: str) -> str | None:
    """The class named by the single <answer> pair, or None."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    pair = re.search(r"<answer>(.*)</answer>", completion, re.DOTALL)
    if pair is None:
        return None
    text = " ".join(pair.group(1).casefold().split()).removesuffix(".").rstrip()
    return {name.casefold(): name for name in CLASSES}.get(text)
