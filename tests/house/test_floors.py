"""The house keeps its floors: who imports whom, where optional packages and the environment are touched, sizes."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "internlm"

FLOORS = {
    "utils": 0,
    "config": 1,
    "core": 2,
    "ops": 3,
    "model": 4,
    "parallel": 5,
    "solver": 5,
    "data": 5,
    "train": 6,
    "checkpoint": 7,
    "monitor": 8,
    "apis": 9,
}
# Not needed to train on a CPU: each is used by one file, which says what happens without it.
OPTIONAL = (
    "bitsandbytes",
    "cudnn",
    "datasets",
    "fastapi",
    "flash_attn",
    "flash_attn_interface",
    "lm_eval",
    "matplotlib",
    "peft",
    "pyarrow",
    "s3fs",
    "streamlit",
    "tensorboard",
    "tokenizers",
    "torch.utils.tensorboard",
    "torchao",
    "transformers",
)
# Looked up when the module is imported, because a compiled block can't do it later.
AT_IMPORT = {"cudnn", "flash_attn", "flash_attn_interface"}
# Where the environment is read besides core and utils, and why.
DOORS = {
    "internlm/train/cli.py": "the command line: which launcher started this process",
    "internlm/data/text.py": "the user's cache folder",
}
RUNTIME = {"torch", "numpy", "pydantic", "rich", "safetensors", "sentencepiece", "fsspec", "jinja2"}

MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in MODULES}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str | None:
    """The folder of a module under internlm/, None for internlm/__init__.py itself."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imports(path: Path, nodes: list[ast.AST] | None = None) -> Iterator[tuple[str, int]]:
    """(module, line) of every import statement of a file, inside functions too, relative ones made absolute."""
    package = ("internlm", *path.relative_to(PACKAGE).parts[:-1])
    for node in nodes if nodes is not None else ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module or "") if part)
            yield stem, node.lineno
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def at_import(path: Path) -> list[ast.AST]:
    """The nodes that run when the module is imported: not function bodies, not `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [TREES[path]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        found.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in MODULES} - {None} <= set(FLOORS)


def test_imports_go_down() -> None:
    wrong = []
    for path in MODULES:
        here = room(path)
        for name, line in imports(path):
            parts = name.split(".")
            if here is None or parts[0] != "internlm" or len(parts) < 2:
                continue
            there = parts[1]
            if there in FLOORS and there != here and FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{relative(path)}:{line}: {here} ({FLOORS[here]}) imports {there} ({FLOORS[there]})")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_the_package_file_is_not_imported_from_inside() -> None:
    """`from internlm import X` in a room would be an upward import in disguise."""
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        if room(path)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ImportFrom)
        and node.module == "internlm"
        and any(alias.name not in FLOORS and alias.name != "__version__" for alias in node.names)
    ]
    assert not wrong, wrong


def test_no_import_cycle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: {target for target, _ in imports(path, at_import(path)) if target in names and target != name}
        for name, path in names.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_optional_packages_live_in_one_file_each() -> None:
    users: dict[str, set[str]] = defaultdict(set)
    wrong = []
    for path in MODULES:
        eager = {line for _, line in imports(path, at_import(path))}
        for name, line in imports(path):
            for package in OPTIONAL:
                if name == package or name.startswith(package + "."):
                    users[package].add(relative(path))
                    if line in eager and package not in AT_IMPORT:
                        wrong.append(f"{relative(path)}:{line} imports {package} at the top: use it inside a function")
    wrong += [f"{package} is imported by {sorted(files)}" for package, files in users.items() if len(files) > 1]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_every_import_is_a_requirement() -> None:
    """Nothing is used that only happens to be installed by something else."""
    optional = {name.split(".")[0] for name in OPTIONAL} | {"triton"}
    wrong = sorted(
        f"{relative(path)}:{line}: {name}"
        for path in MODULES
        for name, line in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | RUNTIME | optional | {"internlm"}
    )
    assert not wrong, "\n".join(wrong)
    listed = (ROOT / "requirements" / "runtime.txt").read_text(encoding="utf-8")
    missing = [name for name in RUNTIME if not re.search(rf"^{name}\b", listed, re.M)]
    assert not missing, f"not in requirements/runtime.txt: {missing}"


def test_environment_is_read_at_the_door() -> None:
    """Variables are read where a process starts, and handed on as arguments."""
    wrong = [
        f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in MODULES
        if room(path) not in ("core", "utils") and relative(path) not in DOORS
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
    ]
    assert not wrong, "\n".join(wrong)


def test_ranks_come_from_the_mesh() -> None:
    """`dist.get_rank()` without a group is a global; the mesh and the world carry what is needed."""
    wrong = [
        f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in MODULES
        if room(path) not in ("core", "utils")
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get_rank", "get_world_size")
        and not node.args
        and not node.keywords
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_stay_small() -> None:
    lines = {relative(path): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    long_files = {name: count for name, count in lines.items() if count > 420}
    assert not long_files, f"over 420 lines: {long_files}"
    assert sum(count > 300 for count in lines.values()) <= 4, "more than four files over 300 lines"
    engine = sum(count for name, count in lines.items() if name.startswith("internlm/solver/"))
    assert engine <= 1600, f"the optimizer engine has {engine} lines"
    long_functions = [
        f"{relative(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in MODULES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not long_functions, "\n".join(long_functions)


def test_no_leftovers() -> None:
    """No notes to self, no debugger, no address of one machine."""
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\bbreakpoint\(\)|\bpdb\b|(?<![\w.])/(?:root|home|work)/")
    files = [path for folder in ("internlm", "tools", "configs", "tests", "doc") for path in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("train.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]
    wrong = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in files
        if path.suffix in (".py", ".md", "") and path.is_file() and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_import_is_light() -> None:
    """`import internlm` alone brings neither torch nor anything optional."""
    heavy = ("torch", "pydantic", *(name.split(".")[0] for name in OPTIONAL))
    code = f"import internlm, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_public_names_exist_and_stay_clear_of_optional_packages() -> None:
    """Every name of `__all__` loads, and loading all of them brings in nothing optional."""
    optional = sorted(set(OPTIONAL) - AT_IMPORT)
    code = (
        "import internlm, sys\n"
        "missing = [name for name in internlm.__all__ if not callable(getattr(internlm, name))]\n"
        f"print(missing, [name for name in {optional} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[] []"


def test_public_names_agree() -> None:
    """`__all__`, the lazy table and the types that mypy sees are one list."""
    import internlm

    typed = {
        alias.name
        for node in ast.walk(TREES[PACKAGE / "__init__.py"])
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("internlm.")
        for alias in node.names
    }
    assert set(internlm.__all__) == set(internlm._ROOMS) == typed
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = internlm.no_such_name
    with pytest.raises(AttributeError, match=r"of 2023; see doc/library\.md for internlm\.Trainer"):
        _ = internlm.initialize_trainer
