"""Means with 95 % intervals, single and paired, by a bootstrap over patients."""

import itertools

import numpy as np

FEWEST = 10  # clusters: of fewer the bootstrap's interval is too narrow, of one it has no width


def bootstrap(
    values: np.ndarray, clusters: list, kinds: list | None = None, draws: int = 1000
) -> dict:
    """The mean of `values` and its 95 % bootstrap interval: {"mean", "interval_95": [low, high]}.

    The interval is None of fewer than FEWEST clusters; of no values the mean is None, too.

    Clusters (patients) are drawn, not values, since one person's slices are alike. For two models
    on the same items, `values` are the items' differences: that is the paired bootstrap. With
    `kinds` (one per value) also "kinds", the same by kind, and "macro", of the mean over kinds.
    """
    if not len(values):
        return {"mean": None, "interval_95": None}
    clusters = [str(cluster) for cluster in clusters]
    _, rows = np.unique(clusters, return_inverse=True)
    labels = ["all"] * len(values) if kinds is None else kinds
    names, columns = np.unique(labels, return_inverse=True)
    count = rows.max() + 1
    sums, sizes = np.zeros((2, count, len(names)))  # [clusters, kinds] each
    np.add.at(sums, (rows, columns), values)
    np.add.at(sizes, (rows, columns), 1)
    counts = (sizes > 0).sum(0)  # [kinds] clusters
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
    weights = np.concatenate([np.ones((1, count)), drawn])  # the first row: the sample itself
    sums, sizes = weights @ sums, weights @ sizes  # [1 + draws, kinds]
    means = np.divide(sums, sizes, out=np.full_like(sums, np.nan), where=sizes > 0)

    def interval(column: np.ndarray, count: int) -> dict:
        ends = None
        if count >= FEWEST:
            ends = np.nanpercentile(column[1:], [2.5, 97.5]).tolist()
        return {"mean": float(column[0]), "interval_95": ends}

    result = interval(sums.sum(1) / sizes.sum(1), count)
    if kinds is not None:
        result["macro"] = interval(np.nanmean(means, 1), count)
        columns = zip(names.tolist(), means.T, counts, strict=True)
        result["kinds"] = {name: interval(*column) for name, *column in columns}
    return result


def paired_differences(groups: dict[tuple[str, str], list], names: dict) -> list[dict]:
    """Second minus first on the same items: of two models (named by `names`) and of two prompts.

    `groups`: of each model and kind, a prompt form or a general-skill set, the rows with `score`
    and `patient`.
    """
    pairs, kinds = [], dict.fromkeys(kind for _, kind in groups)
    for one, other in itertools.combinations(names, 2):
        pairs += [((one, kind), (other, kind)) for kind in kinds]
    if kinds.keys() >= {"direct", "think"}:
        pairs += [((name, "direct"), (name, "think")) for name in names]
    result = []
    for first, second in pairs:
        both = zip(groups[first], groups[second], strict=True)
        gain = [after.score - before.score for before, after in both]
        ends = {"from": [names[first[0]], first[1]], "to": [names[second[0]], second[1]]}
        result.append(ends | bootstrap(gain, [row.patient for row in groups[first]]))
    return result
