"""Finds a method's class by the name of its file, and reads its arguments without importing torch.

A method is one file with one public class of its kind (``bricks/lora.py`` holds one `Brick`). Its
annotated ``__init__`` has no defaults: they stand in its YAML, and the two are held against each
other here before anything heavy is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfm_train import paths
from cfm_train.config import types as ranges

#: What an annotation may name.
_NAMESPACE: dict[str, Any] = {
    **{
        name: getattr(typing, name) for name in ("Any", "Annotated", "Literal", "Optional", "Union")
    },
    **{name: value for name, value in vars(ranges).items() if not name.startswith("_")},
    "Mapping": Mapping,
    "Sequence": Sequence,
}
_BUILTINS = {kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)}


class SignatureError(Exception):
    """A method's file does not keep the contract: the programmer's mistake, not the person's."""


@functools.cache
def kinds(room: str, base: str) -> tuple[str, ...]:
    """The methods of a room: its files that hold a class derived from ``base``."""
    files = sorted((paths.PACKAGE / room).glob("*.py"))
    return tuple(path.stem for path in files if _find(path, base) is not None)


def class_of(room: str, kind: str, base: type) -> type[Any]:
    """The class of a method itself; its file is imported, and torch with it if it asks for it.

    Args:
        room: folder of the package, for example ``merging/sparsify``.
        kind: file name without ``.py``.
        base: the class that the method derives from.
    """
    module = importlib.import_module(f"cfm_train.{room.replace('/', '.')}.{kind}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
    )


@functools.cache
def arguments(room: str, kind: str, base: str) -> dict[str, Any]:
    """The arguments of a method's ``__init__`` with their evaluated annotations.

    Args:
        room: folder of the package, for example ``bricks``.
        kind: file name without ``.py``.
        base: name of the class that the method derives from, for example ``Brick``.

    Raises:
        SignatureError: an argument has a default or no annotation that can be read.
    """
    path = paths.PACKAGE / room / f"{kind}.py"
    found = _find(path, base)
    if found is None:
        raise SignatureError(f"{path} holds no class derived from {base}.")
    path, node = found
    init = next(
        (
            part
            for part in node.body
            if isinstance(part, ast.FunctionDef) and part.name == "__init__"
        ),
        None,
    )
    if init is None:
        return {}
    if init.args.defaults or any(default is not None for default in init.args.kw_defaults):
        raise SignatureError(
            f"{path}: {node.name}.__init__ has a default; defaults stand in the YAML."
        )
    given = [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs][1:]
    return {argument.arg: _annotation(path, node.name, argument) for argument in given}


@functools.cache
def constants(room: str, kind: str, base: str) -> dict[str, Any]:
    """The literal values that a method's class sets, such as ``fewest = 2``, by name."""
    found = _find(paths.PACKAGE / room / f"{kind}.py", base)
    values: dict[str, Any] = {}
    for part in found[1].body if found else ():
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant):
            values |= {t.id: part.value.value for t in part.targets if isinstance(t, ast.Name)}
        if isinstance(part, ast.AnnAssign) and isinstance(part.value, ast.Constant):
            values |= (
                {part.target.id: part.value.value} if isinstance(part.target, ast.Name) else {}
            )
    return values


def _annotation(path: Path, owner: str, argument: ast.arg) -> Any:
    where = f"{path}: {owner}.__init__({argument.arg})"
    if argument.annotation is None:
        raise SignatureError(f"{where} has no annotation.")
    source = ast.unparse(argument.annotation)
    try:
        # The text comes from this package's own files; builtins are shut all the same.
        return eval(source, {"__builtins__": {}, **_BUILTINS, **_NAMESPACE})
    except (NameError, TypeError, SyntaxError, AttributeError) as error:
        raise SignatureError(
            f"{where}: '{source}' cannot be read without imports ({error})."
        ) from None


def _find(path: Path, base: str) -> tuple[Path, ast.ClassDef] | None:
    """The public class of a file that derives from ``base``, and the file of its ``__init__``."""
    if path.name.startswith("_") or not path.is_file():
        return None
    tree = ast.parse(path.read_text("utf-8"), str(path))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != base:
            for parent in node.bases:
                name = ast.unparse(parent).rsplit(".", 1)[-1]
                if name == base:
                    return path, node
                inherited = _parent(tree, path, name, base)
                if inherited is not None:
                    own = any(getattr(part, "name", "") == "__init__" for part in node.body)
                    return (path, node) if own else inherited
    return None


def _parent(tree: ast.Module, path: Path, name: str, base: str) -> tuple[Path, ast.ClassDef] | None:
    """Where a parent class of another name stands, if it derives from ``base`` in the end."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for parent in node.bases:
                upper = ast.unparse(parent).rsplit(".", 1)[-1]
                if upper == base:
                    return path, node
                found = _parent(tree, path, upper, base)
                if found is not None:
                    own = any(getattr(part, "name", "") == "__init__" for part in node.body)
                    return (path, node) if own else found
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            file = paths.PACKAGE.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
            if file.is_file() and str(node.module).startswith("cfm_train."):
                return _parent(ast.parse(file.read_text("utf-8")), file, name, base)
    return None
