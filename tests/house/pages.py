"""The fenced blocks of the documentation, and a copy of the tree to run them in."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "doc").glob("*.md"))]

_FENCE = re.compile(r"^```(bash|python)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MANY_GPUS = re.compile(r"^(?:torchrun|srun)\b.*?\btrain\.py\b(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block. `mode`: "" is run as written, "dry-run" with --dry_run, "no-run: REASON" is only parsed."""

    page: Path
    line: int
    language: str
    mode: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def script(self) -> str:
        """What is executed."""
        if self.mode != "dry-run":
            return self.text
        joined = self.text.replace("\\\n", " ")
        ranks = re.search(r"--nproc_per_node=(\d+)", joined)
        return _MANY_GPUS.sub(rf"python train.py\1 --dry_run --world_size {ranks[1] if ranks else 1}", joined)


def blocks(page: Path) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    return [
        Block(page, source[: found.start()].count("\n") + 1, found[1], found[2].strip(), found[3])
        for found in _FENCE.finditer(source)
    ]


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of the sources, without environment, history and outputs."""
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", "runs", "build", "*.egg-info"),
    )
    return folder


def environment(tree: Path) -> dict[str, str]:
    """As after `source .venv/bin/activate`: the running interpreter's commands first, sources from `tree`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tree)}
