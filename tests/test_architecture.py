"""Folders import only from the folders below them. Read from the syntax tree: nothing is run.

All imports count, those inside functions and under TYPE_CHECKING too. `docs/architecture.md` draws the same order.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "trl_selfspec"
# From the ground up. A folder may import from itself and from what stands before it.
FOLDERS = ["utils", "options", "kernels", "control", "simulate", "sampling", "kv_cache", "policy", "drafter", "engine"]
FOLDERS += ["cli", "trainer"]
# A third party's package, and the lowest of our folders that may import it; any other may be imported anywhere.
LOWEST = {
    "triton": "kernels",
    "humming": "kernels",
    "optimum": "kernels",
    "transformers": "sampling",
    "peft": "policy",
}
LOWEST |= dict.fromkeys(("accelerate", "datasets", "trl"), "trainer")
NO_TORCH = {"options", "control", "simulate"}
KERNELS_ONLY = {"triton", "humming"}  # and never eagerly: importing them costs seconds, or fails
TRITON_FILES = "kernels.triton."  # import triton when they are imported, which is therefore done late
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def _imports(node: ast.AST, eager: bool = False) -> Iterator[str]:
    """Dotted names of what is imported below `node`; if `eager`, of what is imported with the module itself."""
    if eager and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, eager)


def _own(name: str) -> str | None:
    """The name below the package, if it is one of the package's."""
    return name.removeprefix(f"{PACKAGE.name}.") if name.startswith(f"{PACKAGE.name}.") else None


def _is_kernel(name: str) -> bool:
    return name.split(".")[0] in KERNELS_ONLY or (_own(name) or "").startswith(TRITON_FILES)


def _violations(file: str, source: str) -> list[str]:
    """What `source` would break if it were the package's file `file`."""
    folder, module = file.split("/")[0].removesuffix(".py"), file.removesuffix(".py").replace("/", ".")
    if folder not in FOLDERS:
        return [f"{file} is in no folder: add it to FOLDERS"]
    floor, tree, problems = FOLDERS.index(folder), ast.parse(source), []
    for name in _imports(tree):
        target = (_own(name) or "").split(".")[0]
        if target and (target not in FOLDERS or FOLDERS.index(target) > floor):
            problems.append(f"{file} imports {name}, which stands above it")
        top = name.split(".")[0]
        if (top in LOWEST and FOLDERS.index(LOWEST[top]) > floor) or (top in KERNELS_ONLY and folder != "kernels"):
            problems.append(f"{file} imports {name}: only {LOWEST[top]}/ may, or what stands above it")
        if top == "torch" and folder in NO_TORCH:
            problems.append(f"{file} imports {name}: this folder needs no torch")
    if not module.startswith(TRITON_FILES):
        problems += [f"{file} imports {name} eagerly" for name in _imports(tree, eager=True) if _is_kernel(name)]
    return problems


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The modules of each circle: those that reach themselves."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = imports.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    everything = {module: reached(module) for module in imports}
    return [
        [a, *sorted(b for b in everything[a] if a in everything[b] and b != a)] for a in imports if a in everything[a]
    ]


def _module_graph() -> dict[str, set[str]]:
    """Which of the package's files each file imports."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = [_own(name) for name in _imports(ast.parse(path.read_text()))]
        targets = {candidate for name in names if name for candidate in (name, name.rpartition(".")[0])}
        graph[module] = targets & set(modules) - {module}
    return graph


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_folders_import_only_downward(path: Path) -> None:
    """An upward import makes the engine need a trainer, or the algebra need transformers."""
    assert _violations(path.relative_to(PACKAGE).as_posix(), path.read_text()) == []


def test_no_circle() -> None:
    """Two files that import each other, even late, are one file that nobody can read in order."""
    assert _circles(_module_graph()) == []


def test_the_drawn_order_is_this_one() -> None:
    """A picture that is not the code's misleads who reads it first."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    drawn = [
        line.split("`")[1].rstrip("/").removesuffix(".py") for line in text.splitlines() if line.startswith("| `")
    ]
    assert drawn == FOLDERS[::-1]


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("sampling/rng.py", "import peft", "only policy/ may"),
        ("control/stats.py", "from trl_selfspec.engine.engine import SelfSpecEngine", "stands above"),
        ("control/stats.py", "def f():\n    import torch", "needs no torch"),
        ("kernels/linear.py", "def f():\n    from trl_selfspec.policy import replica", "stands above"),
        ("kernels/linear.py", "if TYPE_CHECKING:\n    from trl_selfspec.sampling.rng import Purpose", "stands above"),
        ("engine/engine.py", "from trl_selfspec import trainer", "stands above"),
        ("engine/engine.py", "import trl_selfspec.trainer.config as c", "stands above"),
        ("engine/engine.py", "from trl.trainer import grpo_trainer", "only trainer/ may"),
        ("engine/rollout.py", "def f():\n    import triton", "only kernels/ may"),
        ("kernels/linear.py", "try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None", "eagerly"),
        ("kernels/linear.py", "from trl_selfspec.kernels.triton.attention import attend", "eagerly"),
        ("novel.py", "", "in no folder"),
        ("novel/file.py", "", "in no folder"),
    ],
)
def test_a_bad_import_is_caught(file: str, source: str, message: str) -> None:
    """Negative control: a rule that never fails protects nothing."""
    assert any(message in problem for problem in _violations(file, source))


def test_a_circle_is_caught() -> None:
    """Negative control, with a file beside the circle that is in none."""
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"], ["c", "b"]]


def test_allowed_imports_pass() -> None:
    """The rule must not push authors into workarounds."""
    source = "import torch\nfrom trl_selfspec.options import SelfSpecOptions\ndef g():\n    import triton"
    assert _violations("kernels/linear.py", source) == []
    assert _violations("kernels/triton/novel.py", "import triton\nimport triton.language as tl") == []


def test_importing_the_package_is_cheap() -> None:
    """A launcher, a notebook or `fork` after the import must not find CUDA initialised, nor wait for transformers.
    Importing quanto takes seconds more and, on a GPU machine, touches CUDA: the first quantization does."""
    program = (
        "import sys, trl_selfspec; heavy = {'trl', 'transformers', 'triton', 'humming'} & set(sys.modules); "
        "assert not heavy, heavy; trl_selfspec.SelfSpecEngine; "
        "import torch; assert not torch.cuda.is_initialized(); "
        "assert not {'trl', 'optimum.quanto'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_loads() -> None:
    """Lazy exports fail only when someone asks for them."""
    import trl_selfspec

    assert all(getattr(trl_selfspec, name) is not None for name in trl_selfspec.__all__)
