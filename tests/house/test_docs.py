"""Commands and scripts of the documentation are run as written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.pages import PAGES, ROOT, Block, blocks, copy_of_the_tree, environment

ALL = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [page for page in PAGES if any(not block.mode.startswith("no-run") for block in blocks(page))]
LIMIT = 900  # seconds for one block: the longest takes half a minute on two cores that are idle


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.place)
def test_block_is_well_formed(block: Block) -> None:
    """Every block parses, and one that is not run says why."""
    assert block.mode in ("", "dry-run") or re.fullmatch(r"no-run: .{8,}", block.mode), block.mode
    if block.language == "python":
        ast.parse(block.text)
    else:
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page, top to bottom, in one copy of the tree."""
    tree = copy_of_the_tree(tmp_path / "internlm")
    for block in blocks(page):
        if block.mode.startswith("no-run"):
            continue
        if block.language == "python":
            script = tmp_path / "block.py"
            script.write_text(block.script(), encoding="utf-8")
            command = [sys.executable, str(script)]
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.script()]
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment(tree),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{done.stdout[-4000:]}"


def test_links_lead_somewhere() -> None:
    """Relative links of every page, and the files and folders it names in backticks."""
    wrong = []
    for page in PAGES:
        source = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source):
            if not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: link to {target}")
        for name in re.findall(r"`((?:internlm|configs|tools|tests|doc|requirements|benchmarks)/[\w./-]+)`", source):
            if not (ROOT / name).exists() and "mine" not in name:
                wrong.append(f"{page.relative_to(ROOT)}: names {name}")
    assert not wrong, "\n".join(wrong)


def test_configuration_page_is_current() -> None:
    """doc/configuration.md is what the schema says now."""
    from internlm.config.help import render_markdown

    page = (ROOT / "doc" / "configuration.md").read_text(encoding="utf-8")
    assert page.strip() == render_markdown().strip(), (
        "write it anew: python -c 'from internlm.config.help import render_markdown as r; print(r())' "
        "> doc/configuration.md"
    )


def test_make_targets_of_the_pages_exist() -> None:
    """`make X` in a page names a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)`", page.read_text(encoding="utf-8"))}
    assert named and named <= targets
