import numpy as np


def patient_interval(
    values: np.ndarray, patients: list[str], draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the mean of `values` and its 95 % interval over patients."""
    rng = np.random.default_rng(seed)
    patients = np.array(patients)
    slices = [values[patients == patient] for patient in np.unique(patients)]
    means = []
    for _ in range(draws):
        drawn = rng.choice(len(slices), len(slices), replace=True)
        means.append(np.concatenate([slices[i] for i in drawn]).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)
