"""The public API: every name is there, documented, and the core needs neither TRL nor a notebook."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import alignkit

PACKAGE = pathlib.Path(alignkit.__file__).parent
CORE = ("tokens", "kl", "world", "data", "models", "sampling", "ppo", "dpo", "exact", "evaluate", "relay")


@pytest.mark.parametrize("name", alignkit.__all__)
def test_every_public_name_exists_and_is_documented(name):
    module = importlib.import_module(f"alignkit.{alignkit._HOME[name]}")
    value = getattr(module, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    assert value.__module__ == module.__name__, f"{name} is defined in {value.__module__}"


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    assert not set(alignkit.__all__) & {path.stem for path in PACKAGE.glob("*.py")}
    assert alignkit.__all__ == sorted(alignkit.__all__)


def test_every_public_function_of_every_module_has_a_docstring():
    missing = [
        f"{path.name}: {node.name}"
        for path in PACKAGE.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing


def test_the_core_imports_without_trl_datasets_matplotlib_papermill_and_widgets():
    banned = ("trl", "datasets", "matplotlib", "papermill", "ipywidgets", "accelerate")
    code = f"import sys; sys.modules.update({{name: None for name in {banned}}})\n" + "\n".join(
        f"import alignkit.{name}" for name in CORE
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_imports_go_in_one_direction():
    """No module imports, at its top level, one that imports it."""
    needs = {}
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        needs[path.stem] = {node.module.split(".")[1] for node in tree.body if isinstance(node, ast.ImportFrom)
                            and (node.module or "").startswith("alignkit.")}
    order, left = [], dict(needs)
    while left:
        ready = sorted(name for name, its in left.items() if not its - set(order))
        assert ready, f"import cycle among {sorted(left)}"
        order += ready
        left = {name: its for name, its in left.items() if name not in ready}


def test_nothing_unsafe_is_loaded():
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.parent.glob("widgets/alignkit_widgets/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "pickle.load", "pickle.loads"), path
