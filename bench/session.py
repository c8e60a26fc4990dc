"""The notebook of the demo, cell by cell: what a person would have in a kernel after a while."""

from __future__ import annotations

IMPORTS = """
import threading, time
import numpy as np
import pandas as pd
"""

COMPUTE = """
rows = {rows}
chance = np.random.default_rng(2026)
days = pd.to_timedelta(np.sort(chance.integers(0, 365, rows)), unit="D")
orders = pd.DataFrame({{
    "order": np.arange(rows) + 10_000_000,
    "customer": chance.zipf(1.4, rows).clip(max=200_000),
    "day": pd.Timestamp("2025-01-01") + days,
    "price": chance.lognormal(3, 1, rows).round(2),
    "quantity": (chance.poisson(2, rows) + 1).astype(np.int32),
    "country": pd.Categorical.from_codes(
        chance.integers(0, 40, rows).astype(np.int8), [f"C{{n:02}}" for n in range(40)]),
    "returned": chance.random(rows) < 0.05,
}})
orders["paid"] = orders["price"] * orders["quantity"] * ~orders["returned"]
by_country = orders.groupby("country", observed=True)["paid"].agg(["sum", "mean", "size"])
best = orders.groupby("customer")["paid"].sum().nlargest(100)

paths = chance.standard_normal(({paths}, 365)).cumsum(axis=1)
correlation = np.corrcoef(paths[:1500])
eigenvalues = np.linalg.eigvalsh(correlation)
"""

# None of these can be pickled, or not as what they are.
ALIVE = """
ticks = 0

def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1

threading.Thread(target=tick, name="ticker", daemon=True).start()

def walk_countries():
    for number, (name, row) in enumerate(by_country.iterrows(), 1):
        yield f"{number} of {len(by_country)}: {name}"

tour = walk_countries()
for _ in range(3):
    where = next(tour)
"""

FIRST = "print(f'{where!r} -> {next(tour)!r}, {len(orders):,} orders')"

# Every byte of every array, and what the generator of random numbers would say next.
PROOF = """
import zlib
def fingerprint():
    found = zlib.crc32(paths.data)
    for name in orders:
        column = orders[name]
        values = column.cat.codes.to_numpy() if name == "country" else column.to_numpy()
        found = zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, found)
    draw = np.random.Generator(type(chance.bit_generator)())
    draw.bit_generator.state = chance.bit_generator.state
    return f"{found:08x} {eigenvalues.sum():.12f} {best.sum():.2f} {draw.random():.15f}"
print(fingerprint())
"""

NEXT = """
late = orders[(orders["day"] >= "2025-11-01") & ~orders["returned"]]
report = late.groupby("country", observed=True)["paid"].sum().nlargest(3)
print(", ".join(f"{name} {value:,.0f}" for name, value in report.items()))
"""

MORE = """
more = [chance.standard_normal(paths.shape).cumsum(axis=1) for _ in range(2)]
print(f"{sum(walks.nbytes for walks in more) >> 20} MiB more, of {len(more) * len(paths):,} walks")
"""

ABOUT = """
import os
print(len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), ticks)
"""
