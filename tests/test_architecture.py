"""Floors import only downward, and importing the package stays cheap. Read from the syntax tree: nothing is run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "trl_selfspec"
FLOORS = tuple(
    set(names.split())
    for names in (
        "sampling rejection stats estimates controller options timing scheduler transfer",
        "quantize backends choosing kernels verification",
        "law sharding adapters cache kept admission attention layers mirror drafter forms graphs rounds memory "
        "requests rollout selfcheck engine generation",
        "config fallbacks reporting following checkpointing mixin trainer model_card",
    )
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
LOWEST_FLOOR = {"optimum": 1, "transformers": 2, "peft": 2, "accelerate": 3, "datasets": 3, "trl": 3}
KERNEL_ONLY = {"triton", "humming"}
TRITON_MODULES = "trl_selfspec.kernels.triton."  # import triton when they are imported, which is therefore done late
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def _imports(tree: ast.AST, path: Path) -> list[str]:
    """Absolute dotted name of everything imported below `tree`; `from . import a` counts as an import of `a`."""
    found, package = [], ("trl_selfspec", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            ours = base.split(".")[0] == PACKAGE.name
            found += [f"{base}.{alias.name}" for alias in node.names] if ours else [base]
    return found


def _eager_imports(node: ast.AST, path: Path) -> list[str]:
    """Imports that run when the module is imported: everything outside functions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return []
    if isinstance(node, ast.Import | ast.ImportFrom):
        return _imports(node, path)
    return [name for child in ast.iter_child_nodes(node) for name in _eager_imports(child, path)]


def _floor(name: str) -> int:
    """Floor of an absolute dotted name; a name of this package without one counts as the highest."""
    top, _, rest = name.partition(".")
    return FLOOR_OF.get(rest.split(".")[0], len(FLOORS)) if top == PACKAGE.name else LOWEST_FLOOR.get(top, 0)


def _violations(path: Path, source: str) -> list[str]:
    """What `source` would break if it were the package's file `path`."""
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own not in FLOOR_OF:
        return [f"{path.name} belongs to no floor: add it to FLOORS"]
    tree, floor = ast.parse(source), FLOOR_OF[own]
    imports = _imports(tree, path)
    problems = [f"{path.name} of floor {floor} imports {n} of floor {_floor(n)}" for n in imports if _floor(n) > floor]
    problems += [f"{path.name} imports {n}: only kernels/ may" for n in imports if _is_kernel(n) and own != "kernels"]
    if _is_triton(path):
        return problems
    return problems + [f"{path.name} imports {n} eagerly" for n in _eager_imports(tree, path) if _is_kernel(n)]


def _is_kernel(name: str) -> bool:
    """Whether importing `name` imports triton or humming: a module of ours that does counts as triton itself."""
    return name.split(".")[0] in KERNEL_ONLY or name.startswith(TRITON_MODULES)


def _is_triton(path: Path) -> bool:
    return ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]).startswith(TRITON_MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors_import_only_downward(path: Path) -> None:
    """An upward import makes the engine need a trainer, or the algebra need transformers."""
    assert _violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("sampling.py", "import transformers", "of floor 2"),
        ("stats.py", "from .engine import SelfSpecEngine", "of floor 2"),
        ("quantize.py", "def f():\n    from trl_selfspec.policy.replica import build", "of floor 2"),
        ("engine.py", "from . import trainer", "of floor 3"),
        ("engine.py", "from trl_selfspec import trainer", "of floor 3"),
        ("engine.py", "import trl_selfspec.trainer.config as c", "of floor 3"),
        ("kernels/cpu.py", "from ..engine import SelfSpecEngine", "of floor 2"),
        ("engine.py", "from trl.trainer import grpo_trainer", "of floor 3"),
        ("rounds.py", "def f():\n    import triton", "only kernels/ may"),
        ("kernels/gpu.py", "try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None", "eagerly"),
        ("kernels/gpu.py", "from trl_selfspec.kernels.triton import attention", "eagerly"),
        ("kernels/gpu.py", "from .cuda.attention import attend", "eagerly"),
        ("attention.py", "def f():\n    from trl_selfspec.kernels.triton import attention", "only kernels/ may"),
        ("novel.py", "", "belongs to no floor"),
    ],
)
def test_a_bad_import_is_caught(file: str, source: str, message: str) -> None:
    """Negative control: a rule that never fails protects nothing."""
    assert any(message in problem for problem in _violations(PACKAGE / file, source))


def test_allowed_imports_pass() -> None:
    """The rule must not push authors into workarounds."""
    source = "import torch\nfrom ..options import SelfSpecOptions\nfrom .twin import f\ndef g():\n    import triton"
    assert _violations(PACKAGE / "kernels/gpu.py", source) == []
    assert _violations(PACKAGE / "kernels/triton/novel.py", "import triton\nimport triton.language as tl") == []


def test_importing_the_package_is_cheap() -> None:
    """A launcher, a notebook or `fork` after the import must not find CUDA initialised, nor wait for transformers."""
    program = (
        "import sys, trl_selfspec; heavy = {'trl', 'transformers', 'triton', 'humming'} & set(sys.modules); "
        "assert not heavy, heavy; trl_selfspec.SelfSpecEngine; "
        "import torch; assert not torch.cuda.is_initialized(); assert 'trl' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_loads() -> None:
    """Lazy exports fail only when someone asks for them."""
    import trl_selfspec

    assert all(getattr(trl_selfspec, name) is not None for name in trl_selfspec.__all__)
