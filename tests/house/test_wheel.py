"""A wheel, installed where nothing else of ours is, trains."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.house.pages import ROOT, blocks

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "requirements", "internlm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path) -> Path:
    """The interpreter of a new venv with the wheel; torch and the like are borrowed by one .pth line.

    An editable install of this tree is not borrowed: a .pth file inside a borrowed folder is not read.
    """
    venv = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(site.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    # The borrowed folder may hold another internlm; this one goes in front of it.
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True)
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    packaged = {name for name in names if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "internlm").rglob("*")
        if path.is_file() and path.suffix in (".py", ".typed", ".jinja", ".in")
    }
    assert packaged == sources
    version = re.search(r'__version__ = "(.+)"', (ROOT / "internlm" / "__init__.py").read_text(encoding="utf-8"))
    assert version and f"\nVersion: {version[1]}\n" in metadata
    assert re.search(r"^Requires-Dist: torch<2\.14,>=2\.11$", metadata, re.MULTILINE)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_library_script_trains_from_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    """The script of doc/library.md, in an empty folder, with the wheel alone."""
    script = next(block for block in blocks(ROOT / "doc" / "library.md") if block.language == "python")
    (tmp_path / "script.py").write_text(script.text, encoding="utf-8")
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    where = [clean_python, "-c", "import internlm; print(internlm.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(clean_python.parent.parent)
    done = subprocess.run(
        [clean_python, "script.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(re.findall(r"^step \d+ loss \d+\.\d+", done.stdout, re.MULTILINE)) == 5, done.stdout[-3000:]
