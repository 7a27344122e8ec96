import random


def split_records(records: list[dict], test_fraction: float, seed: int) -> tuple[list, list]:
    """(training records, test records), divided by record["patient"]."""
    patients = sorted({record["patient"] for record in records})
    random.Random(seed).shuffle(patients)
    count = round(test_fraction * len(patients))
    if len(patients) > 1:
        count = min(max(count, 1), len(patients) - 1)
    test = set(patients[:count])
    train_records = [r for r in records if r["patient"] not in test]
    test_records = [r for r in records if r["patient"] in test]
    return train_records, test_records
