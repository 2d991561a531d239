"""The model is what a user could have written: it imports the public interface alone, and nothing needs it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dsv4_jax

PACKAGE = Path(dsv4_jax.__file__).parent
MODEL = PACKAGE / "deepseek_v4"
COMMAND_LINE = PACKAGE / "tools"  # and what it runs: the benchmark
NAME = "dsv4_jax.deepseek_v4"
FILE_FORMATS = ("dsv4_jax.tensor_files", "dsv4_jax.json_text")  # which know nothing of caches or models


def imports(path: Path) -> Iterator[tuple[str, str | None, bool]]:
    """Module, name (None for ``import module``) and whether it comes late, of everything imported.

    Late is what is inside a function, or for type checkers alone.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for part in ast.walk(tree) for late in late_parts(part) for node in ast.walk(late)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from ((node.module, alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) in inside) for alias in node.names)


def late_parts(node: ast.AST) -> list[ast.stmt]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.body
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return node.body  # what follows after else is not late
    return []


def is_model(module: str, name: str | None) -> bool:
    return f"{module}.{name}.".startswith(f"{NAME}.")


def breaches_of_the_public_interface(path: Path) -> list[tuple[str, str | None]]:
    return [
        (module, name)
        for module, name, _ in imports(path)
        if module.split(".")[0] == "dsv4_jax"
        and not is_model(module, name)
        and module not in FILE_FORMATS
        and (module != "dsv4_jax" or name not in dsv4_jax.__all__)
    ]


def test_the_model_imports_the_public_interface_alone():
    files = sorted(MODEL.rglob("*.py"))
    assert len(files) > 8
    assert {path.name: breaches for path in files if (breaches := breaches_of_the_public_interface(path))} == {}


def test_only_the_command_line_imports_the_model_and_only_when_it_runs_it():
    for path in sorted(PACKAGE.rglob("*.py")):
        if MODEL in path.parents:
            continue
        for module, name, late in imports(path):
            if is_model(module, name):
                assert COMMAND_LINE in path.parents, f"{path} imports {module}"
                assert late, f"{path} imports {module} before it is asked to run it"


def test_breaches_are_seen(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(
        "import dsv4_jax.ops\n"
        "from dsv4_jax import begin, ops, native\n"
        "from dsv4_jax.deepseek_v4 import model\n"
        "from dsv4_jax.deepseek_v4.model import step\n"
        "def f():\n    from dsv4_jax.spec.rotary import rotary\n"
        "if TYPE_CHECKING:\n    import typing\nelse:\n    import enum\n"
    )
    assert breaches_of_the_public_interface(path) == [
        ("dsv4_jax.ops", None),
        ("dsv4_jax", "native"),
        ("dsv4_jax.spec.rotary", "rotary"),
    ]
    models = [is_model(module, name) for module, name, _ in imports(path)]
    assert models == [False, False, False, False, True, True, False, False, False]
    late = {module: late for module, _, late in imports(path)}
    assert [module for module in late if late[module]] == ["dsv4_jax.spec.rotary", "typing"]
