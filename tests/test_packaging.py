"""The wheel holds everything: what an editable install finds anyway must be in the list too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Top folders that hold Python but are no part of the product.
NOT_SHIPPED = {"tests", "bench", "docs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, as a release would be."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "a tree of any name"
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for package in _packages_of_the_tree():
        parts = package.split(".")[1:]
        tree.joinpath(*parts).mkdir(parents=True, exist_ok=True)
        for module in ROOT.joinpath(*parts).glob("*.py"):
            shutil.copy(module, tree.joinpath(*parts))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, tree],
        check=True, timeout=110, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return next(folder.glob("lzy-*.whl"))


def _packages_of_the_tree() -> set[str]:
    """Every folder with an `__init__.py`, by its name as a package."""
    found = {"lzy"}
    for init in ROOT.glob("[!.]*/**/__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts[0] not in NOT_SHIPPED | {"build", "dist"}:
            found.add(".".join(("lzy", *parts)))
    return found


def test_the_list_of_packages_is_complete() -> None:
    """pyproject.toml lists exactly the packages that the tree has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == _packages_of_the_tree()


def test_the_wheel_has_every_module(wheel: Path) -> None:
    """Each module of the tree is in the wheel, with py.typed and the licence; no test is."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in _packages_of_the_tree():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for module in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{module.name}" in names
    assert "lzy/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if "test" in name]


def test_everything_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Installed from the wheel, away from the tree, every module can be imported."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import importlib, pkgutil, sys
site = sys.argv[1]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, site)
import lzy
assert lzy.__file__.startswith(site), lzy.__file__
count = 0
for module in pkgutil.walk_packages(lzy.__path__, "lzy."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        count += 1
print(count)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 10


def test_the_command_is_an_entry_point(wheel: Path) -> None:
    """Installing lzy gives a person the command `lzy`."""
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "lzy = lzy.cli:main" in archive.read(name).decode()
