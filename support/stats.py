"""Means with 95 % intervals, single and paired, by a bootstrap over patients."""

import numpy as np


def bootstrap(values: np.ndarray, clusters: list, kinds: list | None = None, draws: int = 1000) -> dict:
    """Means with 95 % bootstrap intervals: over all values, and with `kinds` also by kind and over the kinds' means.

    Clusters (patients) are drawn, not values, since one person's slices are alike. For two models on the same items,
    `values` are the items' differences: that is the paired bootstrap.
    """
    _, cluster = np.unique([str(c) for c in clusters], return_inverse=True)
    names, kind = np.unique(kinds if kinds is not None else np.zeros(len(values)), return_inverse=True)
    hits, sizes = (np.zeros((cluster.max() + 1, len(names))) for _ in range(2))  # [clusters, kinds]
    np.add.at(hits, (cluster, kind), values)
    np.add.at(sizes, (cluster, kind), 1)
    drawn = np.random.default_rng(0).multinomial(len(hits), np.full(len(hits), 1 / len(hits)), draws)
    weights = np.concatenate([np.ones((1, len(hits))), drawn])  # the first row: the sample itself
    hits, sizes = weights @ hits, weights @ sizes  # [1 + draws, kinds]
    share = np.divide(hits, sizes, out=np.full_like(hits, np.nan), where=sizes > 0)

    def interval(column: np.ndarray) -> dict:
        low, high = np.nanpercentile(column[1:], [2.5, 97.5])
        return {"mean": float(column[0]), "interval_95": [float(low), float(high)]}

    result = interval(hits.sum(1) / sizes.sum(1))
    if kinds is not None:
        result |= {"macro": interval(np.nanmean(share, 1)),
                   "kinds": {str(name): interval(share[:, k]) for k, name in enumerate(names)}}  # fmt: skip
    return result
