"""Writes docs/api.md from the docstrings of all that `import bit_mixup` offers.

    python recipes/make_api.py

Only the source is read, nothing is imported, so the page is the same whatever is installed. A test sees that it is up to date.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):$", re.MULTILINE)
_HEAD = """# Python API

All that `import bit_mixup` offers, by the file it is from. Made from the docstrings by `make docs`; change those, not this page.
"""


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """Writes the reference of the Python API."""

    output: Path = ROOT / "docs" / "api.md"
    """The page."""


def page(package: Path) -> str:
    """The reference of a package as Markdown.

    Args:
        package: the folder, whose `__init__.py` holds `_HOMES`: the public names of each file.
    """
    parts = [_HEAD]
    for home, names in homes(package).items():
        tree = ast.parse((package / f"{home}.py").read_text(encoding="utf-8"))
        definitions = {
            node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }  # each public name is one of these: a test of the form of the code sees to it
        parts.append(f"## {home}\n\n{(ast.get_docstring(tree) or '').splitlines()[0]}\n")
        parts += [text for name in names for text in _entry(definitions[name], definitions)]
    return "\n".join(parts)


def homes(package: Path) -> dict[str, list[str]]:
    """Public names by file, as `_HOMES` in `__init__.py` has them."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES")
    found: dict[str, list[str]] = ast.literal_eval(table)
    return found


Definition = ast.ClassDef | ast.FunctionDef


def _entry(node: Definition, definitions: Mapping[str, Definition]) -> Iterator[str]:
    yield f"### {node.name}\n"
    yield f"```python\n{_signature(node, definitions)}\n```\n"
    yield _markdown(ast.get_docstring(node) or "")
    explained = [(field, text) for field, text in _fields(node, definitions) if text] if isinstance(node, ast.ClassDef) else []
    if explained:
        yield "Args:\n\n" + "\n".join(f"- `{ast.unparse(field.target)}`: {text}" for field, text in explained) + "\n"
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                kinds = {ast.unparse(decorator) for decorator in method.decorator_list}
                shown = f"`.{method.name}`" if "property" in kinds else f"`.{_call(method)}`"
                yield f"**{shown}**\n\n{_markdown(ast.get_docstring(method) or '')}"


def _fields(node: ast.ClassDef, definitions: Mapping[str, Definition]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Fields of a dataclass, those of its bases first, each with the string that follows it."""
    for base in node.bases:
        above = definitions.get(ast.unparse(base))
        if isinstance(above, ast.ClassDef):
            yield from _fields(above, definitions)
    for item, following in pairwise([*node.body, ast.Pass()]):
        if isinstance(item, ast.AnnAssign) and "init=False" not in ast.unparse(item):
            said = following.value if isinstance(following, ast.Expr) else None
            yield item, inspect.cleandoc(said.value) if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""


def _signature(node: Definition, definitions: Mapping[str, Definition]) -> str:
    """As one would write the call; long ones have an argument on each line."""
    if isinstance(node, ast.FunctionDef):
        return _call(node, width=100)
    made = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if made is not None:
        return _call(made, width=100, name=node.name)
    fields = [ast.unparse(item) for item, _ in _fields(node, definitions)]
    bases = [ast.unparse(base) for base in node.bases]
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return f"class {node.name}({', '.join(bases)})"
    return _folded(node.name, fields, "", width=100)


def _call(node: ast.FunctionDef, *, width: int = 1_000, name: str | None = None) -> str:
    arguments = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(arguments, ast.FunctionDef)
    listed = [part for part in _arguments(arguments.args) if part.split(":")[0] not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}".replace("'", "") if node.returns is not None and name is None else ""
    return _folded(name or node.name, listed, returns, width=width)


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Each argument with its type and default, as written."""
    ordinary = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(ordinary) - len(arguments.defaults)), *arguments.defaults]
    yield from (_argument(one, default) for one, default in zip(ordinary, defaults, strict=True))
    if arguments.vararg is not None:
        yield f"*{_argument(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from (_argument(one, default) for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    if arguments.kwarg is not None:
        yield f"**{_argument(arguments.kwarg, None)}"


def _argument(one: ast.arg, default: ast.expr | None) -> str:
    text = one.arg if one.annotation is None else f"{one.arg}: {ast.unparse(one.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _folded(name: str, parts: Sequence[str], returns: str, *, width: int) -> str:
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= width else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
    text, *sections = _SECTION.split(inspect.cleandoc(docstring))
    parts = [text.rstrip() + "\n"]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = inspect.cleandoc(body).splitlines()
        if title in ("Returns", "Yields"):
            parts.append(f"{title}: {' '.join(line.strip() for line in lines if line.strip())}\n")
            continue
        items: list[str] = []
        for line in lines:
            if line.startswith(" ") or not re.match(r"[\w*., ]+: ", line):
                items[-1] += f" {line.strip()}" if line.strip() else ""
            else:
                what, _, meaning = line.partition(": ")
                items.append(f"- `{what}`: {meaning}")
        parts.append(f"{title}:\n\n" + "\n".join(items) + "\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page."""
    config = tyro.cli(ApiConfig, args=list(sys.argv[1:] if argv is None else argv), description=inspect.getdoc(ApiConfig))
    from bit_mixup.storage import write_text

    write_text(config.output, page(ROOT / "bit_mixup"))
    print(config.output)


if __name__ == "__main__":
    main()
