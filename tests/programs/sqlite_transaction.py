"""sqlite in the middle of a transaction: rows not committed, a savepoint, a lock on the file.

Arguments: the database's path, the journal mode (`delete`, `wal`).
"""

import functools
import sqlite3
import subprocess
import sys

from dialogue import Proof, converse

path, mode = sys.argv[1:]

INTRUDER = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], timeout=0)
try:
    print(other.execute("select count(*) from t").fetchone()[0])
    other.execute("begin immediate")
except sqlite3.OperationalError as error:
    print(error)
"""


def look_from_outside() -> list[str]:
    """What another process sees: the rows committed so far, and whether it may write."""
    command = [sys.executable, "-I", "-c", INTRUDER, path]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    base = sqlite3.connect(path, isolation_level=None)
    base.execute(f"pragma journal_mode={mode}")
    base.execute("pragma cache_size=10")  # Spill, so that the file itself is touched.
    base.execute("create table t (n integer primary key, body text)")
    base.executemany("insert into t values (?, ?)", [(n, "x" * 200) for n in range(100)])
    base.execute("begin immediate")
    base.executemany("insert into t values (?, ?)", [(n, "y" * 200) for n in range(100, 150)])
    base.execute("savepoint half")
    base.execute("delete from t where n < 50")
    base.execute("update t set body = 'z'")
    cursor = base.execute("select n from t order by n")
    first = [row[0] for row in cursor.fetchmany(10)]

    @functools.cache
    def prove() -> Proof:
        proof: Proof = {"in transaction": base.in_transaction}
        # The rollback journal shuts readers out as soon as the cache spills; the WAL never does.
        seen = ["100"] if mode == "wal" else []
        proof["outside may not write"] = look_from_outside() == [*seen, "database is locked"]
        proof["cursor"] = first + [row[0] for row in cursor] == list(range(50, 150))
        proof["uncommitted"] = base.execute(
            "select count(*), min(body), max(body) from t"
        ).fetchone() == (100, "z", "z")
        base.execute("rollback to half")
        proof["rolled back to savepoint"] = base.execute(
            "select count(*), min(body), max(body) from t"
        ).fetchone() == (150, "x" * 200, "y" * 200)
        base.execute("commit")
        proof["outside sees the new rows, may write"] = look_from_outside() == ["150"]
        base.execute("begin")
        base.execute("delete from t")
        base.execute("rollback")
        proof["whole"] = base.execute("pragma integrity_check").fetchone() == ("ok",)
        proof["count"] = base.execute("select count(*) from t").fetchone() == (150,)
        return proof

    converse(prove, lambda: base.execute("update t set body = 'spoiled' where n = 120"))


main()
