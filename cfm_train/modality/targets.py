"""Something importable that makes features: found in its source without being run, and known by it.

    encoder.target=package.module.function     the hash of its module's file
    encoder.target=package.module.Net          an nn.Module, the class or one that is made: its
                                               file, and the hash of its weights

Modules of a person's own that the file imports are part of its hash, and what these import; those
of installed packages are not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import file_hash
from cfm_train.errors import UserError, nearest

#: The seed of weights that a class draws when it is made.
SEED = 0


@dataclass(frozen=True)
class Target:
    """Where a target is defined.

    Attributes:
        module: dotted name of its module.
        name: its name in there.
        file: the module's file.
        function: whether it is a plain function, so that its source is all there is of it.
    """

    module: str
    name: str
    file: Path
    function: bool

    def source(self) -> dict[str, str]:
        """The hash of each file that it is written in, by the name of its module."""
        parts = self.module.split(".")
        above = len(parts) + (self.file.name == "__init__.py") - 1
        root = self.file.parents[above]
        found: dict[str, str] = {}
        waiting = [self.module]
        while waiting:
            module = waiting.pop()
            file = _file_of(module, root)
            if module in found or file is None or not _same_owner(module, self.module, root):
                continue
            found[module] = file_hash(file)
            waiting += _imported(file, module)
        return found


def find_target(target: str) -> Target:
    """Finds the definition of ``package.module.name`` without running its module.

    Raises:
        UserError: there is none, or it is a lambda or imported from elsewhere.
    """
    module, dot, name = target.replace(":", ".").rpartition(".")
    key = f"encoder.target={target}"
    try:
        found = importlib.util.find_spec(module) if dot and module else None
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise UserError(
            f"{key}: there is no such module; write package.module.function, of a module that "
            "Python can import here."
        )
    file = Path(found.origin)
    try:
        body = ast.parse(file.read_text("utf-8")).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{key}: {file} is no Python source ({error}).") from None
    known = {one: node for node in body for one in _names(node)}
    if name not in known:
        raise UserError(f"{key}: {file} defines no '{name}'.{nearest(name, known)}")
    node = known[name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        raise UserError(
            f"{key}: {file} only imports '{name}': name the module that defines it, whose source "
            "says what it does."
        )
    if isinstance(getattr(node, "value", None), ast.Lambda):
        raise UserError(f"{key}: '{name}' is a lambda: write a function with def.")
    return Target(module, name, file, isinstance(node, ast.FunctionDef))


def _file_of(module: str, root: Path) -> Path | None:
    """The source of a module below a folder; None where it lies elsewhere."""
    place = root.joinpath(*module.split("."))
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if file.is_file()), None)


def _same_owner(module: str, target: str, root: Path) -> bool:
    """Among installed packages only those of the target's own are read."""
    installed = root.name in ("site-packages", "dist-packages")
    return not installed or module.split(".")[0] == target.split(".")[0]


def _imported(file: Path, module: str) -> list[str]:
    """What a module's source may import, by full name; what is no module is found nowhere."""
    parts = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found: list[str] = []
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError):
        return found  # its bytes are part of the hash all the same
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if base else alias.name for alias in node.names]
            found += [base, *names] if base else names
    return found


def _names(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return []


def open_target(target: Target) -> Any:
    """The target itself: its module is run, and a class is made without arguments.

    Raises:
        UserError: the module cannot be run, or what it defines cannot be called.
    """
    import torch
    from torch import nn

    try:
        made = getattr(importlib.import_module(target.module), target.name)
        if isinstance(made, type):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                made = made()
    except Exception as error:
        # A person's own code may raise whatever it likes.
        raise UserError(
            f"encoder.target: {target.module}.{target.name} cannot be made "
            f"({type(error).__name__}: {error})."
        ) from None
    if not callable(made) or not (target.function or isinstance(made, nn.Module)):
        raise UserError(
            f"encoder.target: {target.module}.{target.name} is a {type(made).__name__}: give a "
            "function or an nn.Module."
        )
    return made


def weights_hash(target: Target) -> str | None:
    """The hash of a module's weights by name, shape and value; None for a function.

    Only running the code tells its weights, so torch is imported for it.
    """
    if target.function:
        return None
    import torch

    hashed = hashlib.sha256()
    for name, value in sorted(open_target(target).state_dict().items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(raw.numpy().tobytes())
    return hashed.hexdigest()
