"""What runs inside the interpreter that lzy asks: collect, release, reseed, tell what is there.

lzy never calls these functions: it sends this text. It runs under any CPython from 3.8 on, in a
namespace of its own that is cleared afterwards, on a thread that is no `threading.Thread`. It
imports only what every interpreter has built in (not even `__future__`, hence the quotes), calls
nothing of the program's where that can be avoided, prints nothing, and catches everything.
"""

# What is looked at are other people's objects, of packages that are not ours to import: nothing of
# them is known but `object`.
# mypy: disable-error-code="attr-defined,arg-type,call-overload,index,misc,operator,union-attr"

import gc
import itertools
import sys
import time

# Toolkits whose objects may only be destroyed by the thread that made them: Tcl aborts otherwise.
BOUND_TO_THREADS = (
    "_tkinter", "PyQt5.QtCore", "PyQt6.QtCore", "PySide2.QtCore", "PySide6.QtCore", "gi", "wx",
)  # fmt: skip
ATOMIC = (int, float, complex, bool, str, bytes, type(None))
SAMPLE = 4096  # elements of a larger container that are looked at; the rest is extrapolated
OBJECT_LIMIT = 300_000
TIME_LIMIT_S = 2.0
WORDS_LIMIT = 120


def answer_to(question: "dict[str, int]") -> bytes:
    """The literal that answers: what was asked for, or `error` in words."""
    try:
        told: dict[str, object] = {"python": sys.version.split()[0]}
        if "variables" in question:
            told["variables"] = list_variables(question["variables"])
        if question.get("trim"):
            told["trim"] = trim()
        if question.get("reseed"):
            told["reseeded"] = reseed()
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}"[:WORDS_LIMIT]}
    forget_thread()
    return repr(told).encode("utf-8", "backslashreplace")


def forget_thread() -> None:
    """Take this thread out of `threading`'s list, where a finalizer that logs may have put it."""
    threading = sys.modules.get("threading")
    try:
        if threading:
            here = threading.get_ident()
            if type(threading._active.get(here)).__name__ == "_DummyThread":
                threading._active.pop(here, None)
    except Exception:
        pass


# -- collecting and releasing ------------------------------------------------------------------


def trim() -> "dict[str, object]":
    """Collect garbage and have the allocators that are loaded give back what they keep."""
    collected, notes = 0, []
    bound = [name for name in BOUND_TO_THREADS if name in sys.modules]
    if bound:
        notes.append(
            f"garbage was not collected: {bound[0]} is loaded, which forbids other threads"
        )
    elif gc.get_debug():
        notes.append("garbage was not collected: the program debugs its collector (gc.set_debug)")
    else:
        for _ in range(3):  # finalizers make garbage of their own
            found = gc.collect()
            collected += found
            if not found:
                break
    for module, release in (("pyarrow", release_arrow), ("torch", release_torch)):
        if module in sys.modules:
            try:
                release(sys.modules[module])
            except Exception as error:
                notes.append(f"{module} did not release its cache: {error}"[:WORDS_LIMIT])
    return {"collected": collected, "notes": notes}


def release_arrow(pyarrow: object) -> None:
    pool = getattr(pyarrow, "default_memory_pool", None)
    if pool:
        pool().release_unused()


def release_torch(torch: object) -> None:
    """Release what torch keeps of the GPU's memory, if it has begun to use a GPU at all."""
    cuda = getattr(torch, "cuda", None)
    if cuda and cuda.is_initialized():
        cuda.empty_cache()


# -- other random numbers ----------------------------------------------------------------------


def reseed() -> "dict[str, object]":
    """Seed anew, from the operating system, every random generator that can be found."""
    urandom = sys.modules["posix"].urandom
    counts: dict[str, int] = {}
    failures: list[str] = []

    def renew(name: str, generator: object, how: "object") -> None:
        try:
            if how(generator) is not False:
                counts[name] = counts.get(name, 0) + 1
        except Exception as error:
            failures.append(f"a generator of {name}: {type(error).__name__}: {error}"[:WORDS_LIMIT])

    kinds: list[tuple[str, object, object]] = []
    if "random" in sys.modules:
        random = sys.modules["random"]
        system = random.SystemRandom  # which has no state

        def seed_python(generator: object) -> bool:
            if issubclass(type(generator), system):
                return False
            # Not its own `seed`, which a subclass may have made mean something else.
            random.Random.seed(generator, int.from_bytes(urandom(32), "little"))
            return True

        kinds.append(("random", random.Random, seed_python))
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        kinds.append(("numpy", getattr(numpy, "BitGenerator", None), seed_bits))
        kinds.append(("numpy", getattr(numpy, "RandomState", None), forget_gauss))
    for thing in gc.get_objects():
        kind = type(thing)
        for name, base, how in kinds:
            if type(base) is type and issubclass(kind, base):
                renew(name, thing, how)
    if "torch" in sys.modules:  # its default generators; the collector knows none of them
        renew("torch", sys.modules["torch"], lambda it: it.seed())
    if "_ssl" in sys.modules:
        renew("OpenSSL", sys.modules["_ssl"], lambda it: it.RAND_add(urandom(64), 64.0))
    return {"generators": sorted(counts.items()), "failures": failures}


def seed_bits(generator: object) -> None:
    """Give a bit generator of numpy the state that a new one of its kind has."""
    fresh = type(generator)().state
    lock = generator.lock
    if not lock.acquire(timeout=TIME_LIMIT_S):
        raise RuntimeError("it is in use")
    try:
        generator.state = fresh
    finally:
        lock.release()


def forget_gauss(state: object) -> None:
    """Have a legacy state of numpy forget the second of a pair of normal numbers, which it keeps.

    Its bit generator is seeded by itself.
    """
    kept = state.get_state(legacy=False)
    if kept.get("has_gauss"):
        fresh = type(state._bit_generator)().state
        state.set_state({**kept, "state": fresh["state"], "has_gauss": 0, "gauss": 0.0})


# -- what there is -----------------------------------------------------------------------------


class Survey:
    """Counts the bytes that roots reach, each object once: for the root that comes to it first."""

    def __init__(self) -> None:
        self.until_s = time.monotonic() + TIME_LIMIT_S
        self.owners: dict[object, str] = {}  # by id; by (device, address) for torch's storages
        self.complete = True
        self.skipped = (type(sys), type(len), type(answer_to.__code__), type(sys._getframe()))
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self.array = getattr(numpy, "ndarray", None)
        self.tensor = getattr(torch, "Tensor", None)
        for module in list(sys.modules.values()):  # what modules hold is nobody's variable
            self.owners[id(module)] = ""
            try:
                self.owners[id(vars(module))] = ""
            except TypeError:
                continue
        for thing in (sys.modules, globals()):
            self.owners[id(thing)] = ""

    def own(self, thing: object) -> None:
        """Leave `thing`, and its attributes, out of what is counted."""
        self.owners[id(thing)] = ""
        for held in gc.get_referents(thing):
            if type(held) is dict:
                self.owners[id(held)] = ""

    def weigh(self, label: str, root: object) -> "dict[str, object]":
        """The row of one variable."""
        row: dict[str, object] = {"name": label, **describe(root)}
        total, device_bytes, count, estimated = 0.0, 0.0, 0, False
        if id(root) in self.owners and not (
            type(root) in ATOMIC and size_of(root, type(root)) < 256
        ):
            row["same_as"] = self.owners[id(root)]
            return {**row, "bytes": 0, "device_bytes": 0, "objects": 0, "estimated": False}
        waiting = [(root, 1.0)]
        while waiting:
            thing, weight = waiting.pop()
            kind = type(thing)
            if id(thing) in self.owners or self.is_skipped(thing, kind):
                continue
            if len(self.owners) > OBJECT_LIMIT or (
                not count & 255 and time.monotonic() > self.until_s
            ):
                self.complete, estimated = False, True
                break
            self.owners[id(thing)] = label
            count += 1
            total += weight * size_of(thing, kind)
            if kind in ATOMIC:
                continue
            try:
                if self.tensor and issubclass(kind, self.tensor):
                    here, elsewhere = self.storage(thing)
                    total += weight * here
                    device_bytes += weight * elsewhere
                inner, share = self.inside(thing, kind)
            except Exception:  # changed under our hands, or stranger than foreseen
                estimated = True
                continue
            estimated |= share != 1.0
            waiting += [(part, weight * share) for part in inner]
        return {
            **row,
            "bytes": int(total),
            "device_bytes": int(device_bytes),
            "objects": count,
            "estimated": estimated,
        }

    def is_skipped(self, thing: object, kind: type) -> bool:
        """Whether it is part of the program rather than of its data."""
        if issubclass(kind, type):
            try:
                return bool(type.__getattribute__(thing, "__module__") != "__main__")
            except AttributeError:
                return True
        return kind in self.skipped

    def inside(self, thing: object, kind: type) -> "tuple[list[object], float]":
        """What it refers to, or a sample of that, and how many each of those stands for."""
        if self.array and issubclass(kind, self.array):
            parts = [thing.base] if thing.base is not None else []
            if thing.dtype.hasobject:
                step = thing.size // SAMPLE + 1
                return parts + thing.flat[::step].tolist(), float(step)
            return parts, 1.0
        if kind in (list, tuple, dict, set, frozenset) and len(thing) > SAMPLE:
            whole = len(thing)
            step = whole // SAMPLE + 1
            if kind in (list, tuple):
                parts = list(thing[::step])
            else:
                keys = thing if kind is not dict else thing.items()
                parts = list(itertools.islice(keys, 0, None, step))
                if kind is dict:
                    parts = [part for pair in parts for part in pair]
            return parts, float(step)
        return gc.get_referents(thing), 1.0

    def storage(self, tensor: object) -> "tuple[int, int]":
        """Bytes of a tensor's storage here and on a device; nothing if they were counted."""
        storage = tensor.untyped_storage()
        device = str(tensor.device)
        place = (device, storage.data_ptr())
        if place in self.owners:
            return 0, 0
        self.owners[place] = ""
        return (storage.nbytes(), 0) if device == "cpu" else (0, storage.nbytes())


def list_variables(limit: int) -> "dict[str, object]":
    """The `limit` largest variables of `__main__` and IPython's outputs, largest first."""
    began_s = time.monotonic()
    main = sys.modules.get("__main__")
    names: dict[str, object] = dict(vars(main)) if main else {}
    survey = Survey()
    hidden: set[str] = {"__builtins__"}
    outputs: dict[object, object] = {}
    shell = getattr(names.get("get_ipython"), "__self__", None)
    if shell is not None and hasattr(type(shell), "run_cell"):
        survey.own(shell)
        user = getattr(shell, "user_ns", None)
        if type(user) is dict:
            survey.owners[id(user)] = ""
            names.update(user)
        hidden |= {"get_ipython", "exit", "quit", "open", "In", "Out"}
        hidden |= {name for name in names if is_history(name)}
        for name in ("Out", "_oh"):
            if type(names.get(name)) is dict:
                outputs.update(names[name])
                survey.owners[id(names[name])] = ""
    rows = [
        survey.weigh(name, value)
        for name, value in names.items()
        if type(name) is str and name not in hidden and not is_plumbing(name, value)
    ]
    rows += [survey.weigh(f"Out[{number}]", value) for number, value in outputs.items()]
    rows.sort(key=lambda row: (-row["bytes"] - row["device_bytes"], row["name"]))
    return {
        "rows": rows[:limit],
        "names": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "device_bytes": sum(row["device_bytes"] for row in rows),
        "complete": survey.complete,
        "took_s": round(time.monotonic() - began_s, 4),
    }


def size_of(thing: object, kind: type) -> int:
    """Its own bytes; a `__sizeof__` in Python may count what it refers to, as that of pandas."""
    try:
        if type(type.__getattribute__(kind, "__sizeof__")) is not type(size_of):
            return sys.getsizeof(thing)
    except Exception:
        pass
    return object.__sizeof__(thing)


def is_history(name: str) -> bool:
    """Whether IPython itself made the name: `_`, `__`, `_3`, `_i`, `_i3`, `_oh` and the like."""
    tail = name[1:]
    return name[:1] == "_" and (
        tail in ("", "_", "__", "i", "ii", "iii", "ih", "oh", "dh", "sh", "exit_code")
        or tail.isdigit()
        or (tail[:1] == "i" and tail[1:].isdigit())
    )


def is_plumbing(name: str, value: object) -> bool:
    """Whether the name is a module, or one that every `__main__` has."""
    return type(value) is type(sys) or (name[:2] == "__" and name[-2:] == "__")


def isinstance_of(thing: object, kinds: "tuple[type, ...]") -> bool:
    """As isinstance, without asking the object, whose `__class__` may be a property."""
    return type(thing) in kinds


def describe(thing: object) -> "dict[str, object]":
    """Its type, and how much of what is in it, in words."""
    kind = type(thing)
    module = str(kind.__module__)
    name = (
        kind.__qualname__ if module in ("builtins", "__main__") else f"{module}.{kind.__qualname__}"
    )
    words = ""
    try:
        if kind in (list, tuple, dict, set, frozenset, str, bytes, bytearray):
            units = {dict: "keys", str: "characters", bytes: "bytes", bytearray: "bytes"}
            words = f"{len(thing):,} {units.get(kind, 'items')}"
        elif module.split(".")[0] in ("numpy", "pandas", "torch", "polars", "pyarrow"):
            shape = getattr(thing, "shape", None)
            if isinstance_of(shape, (tuple,)) or type(shape).__name__ == "Size":
                words = " × ".join(str(int(length)) for length in shape)
            dtype = getattr(thing, "dtype", None)
            if dtype is not None:
                words = f"{words} {dtype}".strip()
    except Exception:
        words = ""
    return {"type": name[:WORDS_LIMIT], "what": words[:WORDS_LIMIT]}
