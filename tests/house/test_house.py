"""The rules of the house: sizes, docstrings, names and what the command line may import."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "stillroom").rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "common", "base", "manager", "helper", "helpers", "handler", "misc"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(tree: ast.AST):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_one_room(path):
    """At most about 300 lines a file and 60 a function: a reader holds each in mind."""
    assert path.read_text().count("\n") <= 310
    long = [(f.name, f.end_lineno - f.lineno + 1) for f in functions(parsed(path)) if f.end_lineno - f.lineno > 65]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_its_duty(path):
    """A module's first line says what it is for (an empty __init__ has nothing to say)."""
    tree = parsed(path)
    assert not tree.body or ast.get_docstring(tree)


def test_no_room_is_named_after_nothing():
    assert not [p for p in SOURCES if p.stem in FORBIDDEN_NAMES]


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert not called.startswith(("pickle.", "dill.", "joblib.")), f"{path}: {called}"
                assert keywords.get("trust_remote_code", "False") == "False", f"{path}: {called}"
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", f"{path}: {called}"
                assert called not in ("yaml.load", "yaml.unsafe_load"), f"{path}: {called}"


def test_help_imports_no_heavy_library():
    """`stillroom --help` answers at once: neither torch nor numpy nor any stage is imported for it."""
    code = (
        "import sys\nfrom stillroom.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'sklearn', 'matplotlib', 'accelerate', 'onnxruntime', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_all_there():
    """Every name of the public interface resolves, and a misspelt one is an AttributeError."""
    import stillroom

    for name in stillroom.__all__:
        assert getattr(stillroom, name) is not None
    with pytest.raises(AttributeError, match="recrod"):
        stillroom.recrod  # noqa: B018


def test_the_public_interface_survives_importing_the_rooms():
    """A submodule of the same name would replace a function: stages are named by nouns for that reason."""
    code = (
        "import stillroom, pkgutil, importlib\n"
        "for m in pkgutil.walk_packages(stillroom.__path__, 'stillroom.'):\n"
        "    importlib.import_module(m.name)\n"
        "print([n for n in ('record', 'fit', 'evaluate', 'export', 'load') if not callable(getattr(stillroom, n))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_published_recipe_schema_is_in_step():
    """docs/recipe.schema.json is what `stillroom schema` prints."""
    from stillroom.recipes.recipe import Recipe

    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == Recipe.model_json_schema()


def _names_taken(path: Path) -> list[tuple[str, str]]:
    taken = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return [(node.module or "", name.name) for node in taken for name in node.names]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_take_only_what_is_there(path):
    """No test runs them, and they import late: a module that moved would be missed until somebody measures."""
    for module, name in _names_taken(path):
        if module.partition(".")[0] == "stillroom":
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"
