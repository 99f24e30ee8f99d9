"""Which tuner types and config keys the installed PEFT knows, read from its source with `ast`.

Importing PEFT means importing torch and transformers: four seconds, where `library add` needs to
know only whether a key of an ``adapter_config.json`` would be passed over.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

from cfm_train.errors import UserError


@functools.cache
def config_keys() -> dict[str, frozenset[str]]:
    """For each tuner type of PEFT (``LORA``, ``IA3``, …) the keys that its config knows.

    Raises:
        UserError: PEFT is not installed.
    """
    found = importlib.util.find_spec("peft")  # finds, does not import
    if found is None or not found.submodule_search_locations:
        raise UserError("PEFT is not installed: run pip install peft.")
    root = Path(found.submodule_search_locations[0])
    classes: dict[str, ast.ClassDef] = {}
    for path in (root / "config.py", *root.glob("tuners/*.py"), *root.glob("tuners/**/config.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
    keys = {}
    for name, node in classes.items():
        peft_type = _type_of(node)
        if peft_type is not None:
            keys[peft_type] = frozenset(_fields(name, classes))
    return keys


def _type_of(node: ast.ClassDef) -> str | None:
    """The type that a config class gives itself: ``self.peft_type = PeftType.LORA``."""
    match = re.search(r"self\.peft_type = PeftType\.(\w+)", ast.unparse(node))
    return match[1] if match else None


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> set[str]:
    """The dataclass fields of a class and of those above it."""
    if name not in classes:
        return set()
    node = classes[name]
    fields = {
        one.target.id
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    for base in node.bases:
        fields |= _fields(ast.unparse(base), classes)
    return fields
