"""The public API: every name is there, documented, and the core needs neither TRL nor a notebook."""

import ast
import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import pytest

import alignkit

PACKAGE = pathlib.Path(alignkit.__file__).parent
ROOT = pathlib.Path(__file__).resolve().parents[1]
# The import order, from the top down. A module imports what stands in a lower row, or in its own folder.
LAYERS = (
    ("experiments", "benchmarks"),
    ("alignkit_widgets.app",),
    ("alignkit_widgets",),
    ("alignkit_widgets.boards", "alignkit_widgets.cockpit", "alignkit_widgets.explorers"),
    ("alignkit_widgets.notebook", "alignkit_widgets.looks", "alignkit_widgets.pages"),
    ("alignkit.__main__",),
    ("alignkit.jobs", "alignkit.sweeps", "alignkit.teaching"),  # the command is in jobs; sweeps and grading run jobs
    ("alignkit.publish",),
    ("alignkit.evaluate",),
    ("alignkit.exact", "alignkit.sft", "alignkit.reward", "alignkit.ppo", "alignkit.dpo", "alignkit.task"),
    ("alignkit.ppo_state", "alignkit.followers"),
    ("alignkit.forward", "alignkit.runs", "alignkit.trainer"),
    ("alignkit.models", "alignkit.data", "alignkit.plots"),
    ("alignkit.folders", "alignkit.sources"),
    ("alignkit.desk", "alignkit.pages", "alignkit.storage"),
    ("alignkit.formulas", "alignkit.optim", "alignkit.shards"),
    ("alignkit.processes",),
    ("alignkit.configs", "alignkit.metrics", "alignkit.stages", "alignkit.errors", "alignkit.safe_text",
     "alignkit.killpoints"),
    ("alignkit",),  # the face itself, which imports by name when a name is first used
)
NOTEBOOKS_IMPORT = {"alignkit", "alignkit.plots", "alignkit.exact", "alignkit_widgets"}
CORE = ("formulas.tokens", "formulas.kl", "formulas.losses", "desk.world", "desk.tiny", "data.rows", "models.loading",
        "forward.sampling", "forward.reading", "ppo", "dpo", "exact", "evaluate", "runs.frozen")


@pytest.mark.parametrize("name", alignkit.__all__)
def test_every_public_name_exists_and_is_documented(name):
    module = importlib.import_module(f"alignkit.{alignkit._HOME[name]}")
    value = getattr(module, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == module.__name__, f"{name} is defined in {value.__module__}"


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    assert not set(alignkit.__all__) & {path.stem for path in PACKAGE.glob("*.py")}
    assert alignkit.__all__ == sorted(alignkit.__all__)


def test_every_public_function_of_every_module_has_a_docstring():
    missing = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing


def test_the_core_imports_without_trl_datasets_matplotlib_papermill_and_widgets():
    banned = ("trl", "datasets", "matplotlib", "papermill", "ipywidgets", "accelerate", "jinja2")
    code = f"import sys; sys.modules.update({{name: None for name in {banned}}})\n" + "\n".join(
        f"import alignkit.{name}" for name in CORE
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def modules_below(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Module name -> file, of alignkit, the widgets, experiments and benchmarks below a repository's root."""
    places = {"alignkit": root, "alignkit_widgets": root / "widgets", "experiments": root, "benchmarks": root}
    files = [(path, above) for name, above in places.items() for path in sorted((above / name).rglob("*.py"))]
    names = [".".join(path.relative_to(above).with_suffix("").parts).removesuffix(".__init__") for path, above in files]
    return dict(zip(names, (path for path, _ in files), strict=True))


def imports_of(modules: dict[str, pathlib.Path]) -> dict[str, set[str]]:
    """Module -> the modules that it imports anywhere, inside functions and under TYPE_CHECKING too."""
    needs = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: line {node.lineno} imports by dots, expected the whole name"
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {part if part in modules else node.module for part in parts}
        needs[name] = (imported & modules.keys()) - {name}
    return needs


def layer_of(module: str) -> tuple[int, str]:
    """The row of LAYERS in which a module stands (the longest name counts), and its name there."""
    rows = [(len(place), row, place) for row, places in enumerate(LAYERS) for place in places
            if module == place or module.startswith(f"{place}.")]
    assert rows, f"{module} stands in no row of LAYERS"
    return max(rows)[1:]


def faults(modules: dict[str, pathlib.Path]) -> list[str]:
    """What is wrong with the imports: upward or sideways ones, and circles."""
    needs, wrong = imports_of(modules), []
    for module, imported in needs.items():
        row, place = layer_of(module)
        for other in imported:
            other_row, other_place = layer_of(other)
            siblings = place == other_place or {place, other_place} <= {
                "alignkit.exact", "alignkit.sft", "alignkit.reward", "alignkit.ppo", "alignkit.dpo", "alignkit.task",
                "alignkit.jobs", "alignkit.sweeps", "alignkit.teaching", "experiments", "benchmarks"}
            if other_row < row or (other_row == row and not siblings):
                wrong.append(f"{module} imports {other}, which does not stand below it")
    left = dict(needs)
    while ready := [module for module, imported in left.items() if not imported & left.keys()]:
        left = {module: imported for module, imported in left.items() if module not in ready}
    return wrong + [f"circle: {', '.join(sorted(left))}"] * bool(left)


def test_imports_go_down_the_list_of_layers_and_in_no_circle():
    modules = modules_below(ROOT)
    assert len(modules) > 100
    assert not faults(modules)


@pytest.mark.parametrize("file, line, fault", [
    ("alignkit/formulas/kl.py", "import alignkit.ppo", "alignkit.formulas.kl imports alignkit.ppo"),
    ("alignkit/jobs/cli.py", "def f():\n    from alignkit_widgets import app",
     "alignkit.jobs.cli imports alignkit_widgets"),
    ("alignkit/models/heads.py", "from alignkit.data import rows", "alignkit.models.heads imports alignkit.data.rows"),
    ("alignkit/data/rows.py", "def f():\n    import alignkit.data.files",
     "circle: alignkit.data.files, alignkit.data.rows"),
])
def test_the_check_of_imports_sees_what_it_must(tmp_path, file, line, fault):
    tree = {"alignkit/ppo.py": "", "alignkit/formulas/kl.py": "", "alignkit/jobs/cli.py": "",
            "alignkit/models/heads.py": "", "alignkit/data/rows.py": "",
            "alignkit/data/files.py": "from alignkit.data.rows import f\n",
            "widgets/alignkit_widgets/app/__init__.py": ""}
    for name, text in {**tree, file: line}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(fault in each for each in faults(modules_below(tmp_path)))
    (tmp_path / file).write_text("")
    assert not faults(modules_below(tmp_path))


def test_notebooks_import_the_public_faces_alone():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            if cell["cell_type"] == "code":
                for node in ast.walk(ast.parse("".join(cell["source"]))):
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    ours = {name for name in names if name.startswith("alignkit")}
                    assert ours <= NOTEBOOKS_IMPORT, f"{path.name}: {ours - NOTEBOOKS_IMPORT}"


def test_every_module_imports_where_there_is_no_flock():
    names = [name for name in modules_below(ROOT) if name.startswith("alignkit.") and name != "alignkit.__main__"]
    code = "import sys, importlib; sys.modules['fcntl'] = None\n" + "\n".join(f"importlib.import_module({name!r})"
                                                                             for name in names)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_help_and_check_load_no_torch_and_the_package_loads_nothing(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    heavy = "{'torch', 'transformers', 'jinja2', 'papermill', 'matplotlib'} & set(sys.modules)"
    for arguments in (["--help"], ["check", str(tmp_path / "pairs.jsonl")]):
        code = (f"import sys, contextlib\nfrom alignkit.jobs.cli import main\n"
                f"with contextlib.suppress(SystemExit): main({arguments!r})\nassert not {heavy}, {heavy}")
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    code = "import sys, alignkit; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_module_fits_in_the_head():
    for name, path in modules_below(ROOT).items():
        if name.startswith("alignkit"):
            text = path.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 600, f"{name} has {len(text.splitlines())} lines"
            assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is for"


FACES = ("alignkit", "alignkit.exact", "alignkit.plots", "alignkit.evaluate", "alignkit_widgets")


@pytest.mark.parametrize("face", FACES)
def test_every_name_that_a_face_lists_is_there(face):
    module = importlib.import_module(face)
    assert all(hasattr(module, name) for name in module.__all__)


def test_nothing_unsafe_is_loaded():
    for path in modules_below(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "pickle.load", "pickle.loads"), path
