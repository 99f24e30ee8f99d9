"""Which tuner types and config keys the installed PEFT knows, read from its source with `ast`.

Importing PEFT means importing torch and transformers, where `library add` needs to know only
whether a key of an ``adapter_config.json`` would be passed over.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

from cfm_train.errors import UserError


@functools.cache
def config_fields() -> dict[str, dict[str, str]]:
    """For each tuner type of PEFT (``LORA``, ``IA3``, …) the keys of its config with their types.

    Returns:
        type -> key -> the annotation as it stands in PEFT's source.

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
    fields = {}
    for name, node in classes.items():
        peft_type = _type_of(node)
        if peft_type is not None:
            fields[peft_type] = _fields(name, classes)
    return fields


def config_keys() -> dict[str, frozenset[str]]:
    """For each tuner type of PEFT the keys that its config knows."""
    return {peft_type: frozenset(fields) for peft_type, fields in config_fields().items()}


def _type_of(node: ast.ClassDef) -> str | None:
    """The type that a config class gives itself: ``self.peft_type = PeftType.LORA``."""
    match = re.search(r"self\.peft_type = PeftType\.(\w+)", ast.unparse(node))
    return match[1] if match else None


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, str]:
    """The dataclass fields of a class and of those above it, with their annotations."""
    if name not in classes:
        return {}
    node = classes[name]
    fields: dict[str, str] = {}
    for base in reversed(node.bases):
        fields |= _fields(ast.unparse(base), classes)
    return fields | {
        one.target.id: ast.unparse(one.annotation)
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
