"""Backbones as a person names them beside each other: several in one run, which must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import tokenizer_files, tokenizer_hash
from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.errors import UserError


def backbone_section(text: str) -> dict[str, Any]:
    """The ``backbone`` section behind a name of ``conf/backbone``, a folder or a Hub id."""
    from cfm_train.config.catalogue import groups
    from cfm_train.config.compose import option

    if text in groups()["backbone"] and text != "hf":
        return option("backbone", text)
    return option("backbone", "hf", path=text)


def same_tokenizer(one: ResolvedBackbone, other: ResolvedBackbone) -> None:
    """Refuses two backbones to which the same text is not the same token numbers.

    Raises:
        UserError: vocabulary or rules differ.
    """
    a, b = one.folder, other.folder
    if tokenizer_hash(a) != tokenizer_hash(b) and _rules(a) != _rules(b):
        raise UserError(
            f"'{one.id}' and '{other.id}' have different tokenizers, so a token means another "
            "thing to each: choose two models with the same tokenizer."
        )
    sizes = [backbone.config.get("vocab_size") for backbone in (one, other)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"'{one.id}' has a vocabulary of {sizes[0]} tokens and '{other.id}' of {sizes[1]}: "
            "choose two models with the same vocabulary."
        )


def _rules(folder: Path) -> Any:
    """What a fast tokenizer does, without settings that only shape a batch; else its files."""
    path = folder / "tokenizer.json"
    if path not in tokenizer_files(folder):
        return tokenizer_hash(folder)
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read '{path}' ({error}): repair it.") from None
    return {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
