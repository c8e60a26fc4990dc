"""A data frame of mixed columns, half-way through a walk over its groups.

With the argument `whole`: the walk uninterrupted, and its digest.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd
from dialogue import Proof, converse

ROWS = 20_000


def make_frame() -> pd.DataFrame:
    numbers = np.random.default_rng(11)
    return pd.DataFrame(
        {
            "key": numbers.integers(0, 40, ROWS),
            "weight": numbers.standard_normal(ROWS),
            "name": [f"row-{n % 977}" for n in range(ROWS)],
            "kind": pd.Categorical.from_codes(numbers.integers(0, 3, ROWS), ["a", "b", "c"]),
            "when": pd.date_range("2026-01-01", periods=ROWS, freq="min", tz="UTC"),
            "count": pd.array(numbers.integers(0, 9, ROWS), dtype="Int64"),
        }
    )


def walk(frame: pd.DataFrame) -> Iterator[str]:
    """One line per group; the generator's frame holds the running result."""
    running = pd.Series(dtype="float64")
    for key, group in frame.groupby("key"):
        running = pd.concat([running, group["weight"].rolling(5).mean().dropna().head(20)])
        names = group["name"].value_counts().sort_index().head(3)
        yield f"{key} {running.sum()!r} {names.to_dict()} {group['count'].sum()} " + str(
            group.groupby("kind", observed=True)["when"].max().to_dict()
        )


def main() -> None:
    frame = make_frame()
    groups = walk(frame)
    if sys.argv[1:] == ["whole"]:
        print(json.dumps(hashlib.sha256("\n".join(groups).encode()).hexdigest()))
        return
    lines = [next(groups) for _ in range(20)]

    @functools.cache
    def prove() -> Proof:
        half_way = len(lines) == 20
        lines.extend(groups)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        joined = frame.merge(frame.groupby("key").mean(numeric_only=True), on="key")
        return {
            "half way": half_way,
            "joined": len(joined) == ROWS,
            "same frame": bool(frame.equals(make_frame())),
            "arguments": ["whole"],
            "answer": digest,
        }

    def spoil() -> None:
        frame.loc[ROWS - 1, "weight"] = 0.5

    converse(prove, spoil)


main()
