"""Does the package keep the form that its README and CONTRIBUTING promise?"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bit_mixup

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""
FILES = {path.stem: path for path in sorted((ROOT / "bit_mixup").glob("*.py"))}
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# A file imports only from floors below its own, so files of one floor never import each other.
FLOORS = [
    {"errors", "catalog", "hub", "kernels"},
    {
        "theory",
        "hyperrule",
        "sampling",
        "storage",
        "environment",
        "weights",
        "objectives",
        "interruption",
        "voting",
        "archives",
        "layers",
        "checking",
    },
    {"laws", "corruption", "calibration", "expansion", "images", "runs", "loading", "memory", "outcomes", "requests"},
    {
        "mixup",
        "unmixing",
        "evaluation",
        "config",
        "augmentation",
        "examples",
        "sources",
        "models",
        "checkpoint",
        "plots",
        "scanning",
    },
    {"losses", "data", "prediction", "diagnostics", "repeating", "report"},
    {"training", "features", "upstream", "doctor", "streaming", "pictures", "launching", "comparison", "publishing"},
    {"planning", "pretraining", "classifier"},
    {"judging", "scoring", "export"},
    {"workflow"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
NO_TORCH = set(FILES) - {
    "loading",
    "voting",
    "memory",
    "mixup",
    "models",
    "checkpoint",
    "training",
    "prediction",
    "features",
    "evaluation",
    "workflow",
    "objectives",
    "launching",
    "pretraining",
    "calibration",
    "expansion",
    "losses",
    "unmixing",
    "diagnostics",
    "judging",
    "report",
    "classifier",
    "scoring",
    "comparison",
    "export",
    "layers",
    "kernels",
    "augmentation",
}


def imports(name: str) -> Iterator[str]:
    """Our own files that a file imports, wherever in it."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{name} imports relatively")
        if isinstance(node, ast.ImportFrom) and node.module == "bit_mixup":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bit_mixup."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bit_mixup."))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_file_is_on_one_floor() -> None:
    assert sorted(name for names in FLOORS for name in names) == sorted(set(FILES) - {"__init__"})


def test_contributing_shows_the_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = [set(re.findall(r"\w+", names)) for names in re.findall(r"^\| \d+ \| ([^|]+) \|", text, re.MULTILINE)]
    assert shown == FLOORS


def test_files_import_only_from_floors_below() -> None:
    pairs = [(name, other) for name in FLOOR_OF for other in imports(name)]
    assert len(pairs) > 60
    for name, other in pairs:
        assert FLOOR_OF[other] < FLOOR_OF[name], f"{name} imports {other}, which stands on the same floor or above"
    for name, floor in FLOOR_OF.items():
        assert floor == 1 + max((FLOOR_OF[other] for other in imports(name)), default=-1), f"{name} could stand lower"


def test_the_configuration_stops_at_the_doors() -> None:
    knowing = {"launching", "planning", "workflow", "pretraining", "cli", "repeating", "scoring", "publishing"}
    assert {name for name in FLOOR_OF if "config" in imports(name)} == knowing


def test_files_that_plan_import_no_torch() -> None:
    heavy = {"torch", "timm", "accelerate", "torchmetrics", "torchvision"}
    for name in NO_TORCH:
        for node in TREES[name].body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            assert not heavy & {str(module).split(".")[0] for module in names}, f"{name} imports {names}"
    assert len(NO_TORCH) >= 14


def test_public_names_are_those_of_the_lazy_table() -> None:
    table = {name: home for home, names in bit_mixup._HOMES.items() for name in names}
    typed = {a.name: str(node.module).split(".")[1] for node in ast.walk(TREES["__init__"])
             if isinstance(node, ast.ImportFrom) and str(node.module).startswith("bit_mixup.") for a in node.names}  # fmt: skip
    assert table == typed
    assert bit_mixup.__all__ == sorted(table)
    assert len(table) > 20
    for name, home in table.items():
        value = getattr(bit_mixup, name)
        assert value.__module__ == f"bit_mixup.{home}"
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"
    assert set(table) <= set(dir(bit_mixup))
    with pytest.raises(AttributeError, match="finetune"):
        bit_mixup.finetune  # noqa: B018


def test_names_of_files_and_functions() -> None:
    names = [node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) > 130
    assert not set(names) & set(FILES)
    assert not set(FILES) & {"utils", "util", "common", "helpers", "misc", "base", "types"}


def test_everything_public_is_documented() -> None:
    seen = 0
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), f"{name} does not say what question it answers"
        scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
        for node in (node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef | ast.ClassDef)):
            plain_property = any(isinstance(d, ast.Name) and d.id == "property" for d in getattr(node, "decorator_list", []))
            if not node.name.startswith("_") and not plain_property:
                seen += 1
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
    assert seen > 100


def test_no_pickles_and_no_remote_code() -> None:
    refused = re.compile(
        r"^\s*(?:import|from) (?:pickle|dill|cloudpickle|joblib)\b|torch\.(?:load|save)\(|allow_pickle=True|trust_remote_code",
        re.MULTILINE,
    )
    files = [*FILES.values(), *RECIPES]
    assert len(files) > 25
    found = {(path.name, match) for path in files for match in refused.findall(path.read_text(encoding="utf-8"))}
    assert found == set()


def test_the_loop_is_under_60_lines() -> None:
    loop = next(function for function in functions(TREES["training"]) if function.name == "train")
    first, last = loop.body[1].lineno, loop.body[-1].end_lineno
    assert last is not None
    assert ast.get_docstring(loop)
    assert 20 < last - first + 1 < 60


def test_files_stay_short() -> None:
    for name, path in FILES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 550, f"{name} wants to be two files"


# What stands in for a Python protocol, or tells of a programmer's fault.
OTHER_RAISES = {("__init__", "AttributeError"), ("cli", "SystemExit"), ("hyperrule", "ValueError")}


def test_raises_are_of_our_own_classes() -> None:
    ours = {node.name for node in TREES["errors"].body if isinstance(node, ast.ClassDef)}
    raised = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):  # `raise` and `raise error` pass something on
                raised.append((name, ast.unparse(node.exc.func)))
    assert len(raised) > 100
    assert {(name, error) for name, error in raised if error not in ours} == OTHER_RAISES
    assert ours - {error for _, error in raised} == {"BitMixupError"}


@pytest.mark.parametrize(("table", "least"), [("Bad input", 60), ("Faults", 20)])
def test_tables_of_reliability_name_tests_that_exist(table: str, least: int) -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split(f"\n## {table}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what |")]
    named = [re.fullmatch(r"\| .+ \| .+ \| `(test_\w+\.py)::(\w+)(?:\[(.+)\])?` \|", row) for row in rows]
    assert len(rows) >= least
    assert all(named), f"no test is named in: {rows[named.index(None)]}"
    trees = {
        file: ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")) for file in {found[1] for found in named if found}
    }
    tests = {file: {function.name for function in functions(tree)} for file, tree in trees.items()}
    cases = {file: {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} for file, tree in trees.items()}
    for file, name, case in (found.groups() for found in named if found):
        assert name in tests[file], f"{file} has no {name}"
        assert case is None or case in cases[file], f"{file} knows nothing of {case}"


def test_readme_is_short_and_contributing_names_every_file() -> None:
    assert 40 < len(README.splitlines()) < 200
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(FILES) - {"__init__", "__main__"}:
        assert f" {name}.py " in contributing, f"the tree lacks {name}.py"
    for path in RECIPES:
        assert path.name in README
