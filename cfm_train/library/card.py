"""The card of an artifact: what ``brick.json`` says about the tensors that lie beside it.

An artifact is whatever an operation writes: a brick, or a backbone made from others. Its version is
the start of the SHA-256 of its tensors and its interface alone, so that the same parameters trained
twice are one version, whatever the runs were called.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError, nearest

FORMAT = 1
CARD_FILE = "brick.json"
#: The file of an artifact in which its heads lie, as ``<task>.<tensor>``.
HEADS_FILE = "heads.safetensors"
#: The kind of an artifact that holds no tensors but heads: it is made from its parents each time it
#: is opened.
STITCH = "stitch"
GRANULARITIES = ("neuron", "neuron_group", "layer", "model")
#: Folders that the library keeps for itself beside the artifacts' names.
RESERVED = frozenset({"stats"})

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_VERSION = re.compile(r"[0-9a-f]{12}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")


@dataclass(kw_only=True)
class Card:
    """Everything that is known about an artifact besides its tensors.

    Attributes:
        name: the artifact's name in the library.
        kind: the brick kind (``lora``, ``ia3``, …), ``peft`` for tuners that run through PEFT.
        version: 12 hexadecimal digits; the library computes it, a new card leaves it empty.
        granularity: ``neuron``, ``neuron_group``, ``layer`` or ``model``.
        sites: names of the sites that the brick plugs into, in the backbone's order.
        requires: fingerprints without which the artifact means nothing: a brick's backbone, then
            its encoder where it has one; both models of a bridge.
        backbone_id: what a person calls that backbone (``minilm``, a Hub id).
        tokenizer: hash of the tokenizer that its inputs went through.
        heads: per head ``{"task": type, "labels": [...] or None, "size": outputs}``.
        operation: the operation that wrote it (``train``, ``merge``, ``add``, …).
        expression: the configuration that it was made from, as text with pinned versions.
        parents: ``{"name": …, "version": …}`` of every artifact that it was made from.
        recipe: the resolved config of the run.
        data: per data set ``{"name": …, "fingerprint": …, "licence": …}``.
        metrics: per metric ``{"value", "low", "high", "n"}``, as in the record.
        files: SHA-256 of every file beside ``brick.json``; filled by the library.
        interface: JSON that, with the tensors, defines the function of the brick.
        licence: SPDX identifier, or None where it is not known.
        created: ISO 8601 time in UTC; filled by the library when empty.
        run: the run (or the person's command) that wrote it.
        home: the folder that it was read from, where that is not its place in a library; never
            stored.
    """

    name: str
    kind: str
    version: str = ""
    granularity: str = "model"
    sites: list[str] = field(default_factory=list)
    requires: list[str] = field(default_factory=list)
    backbone_id: str | None = None
    tokenizer: str | None = None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    operation: str = ""
    expression: str | None = None
    parents: list[dict[str, str]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    interface: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    created: str = ""
    run: str = ""
    format: int = FORMAT
    home: Path | None = field(default=None, compare=False, repr=False)

    @property
    def ref(self) -> str:
        """The full reference, ``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the card that, with the tensors, makes the version: what the brick is and
        where it fits, not how it came to be."""
        return {
            "kind": self.kind,
            "sites": self.sites,
            "requires": self.requires,
            "heads": self.heads,
            "interface": self.interface,
        }

    def to_json(self) -> str:
        """The text of ``brick.json``: sorted keys, two spaces, one newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The content of ``brick.json``."""
        values = dataclasses.asdict(self)
        del values["home"]
        return values

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Card:
        """Reads a card and checks its shape.

        Args:
            text: the content of ``brick.json``.
            where: the file's place, for the error sentence.

        Raises:
            UserError: not JSON, another format, a key that is unknown, missing or of a wrong type.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not a card: it is not valid JSON ({error}).") from None
        if not isinstance(values, dict):
            raise UserError(f"{where} is not a card: it holds no JSON object.")
        if values.get("format") != FORMAT:
            raise UserError(
                f"{where} has card format {values.get('format')!r}, and this version of cfm_train "
                f"reads format {FORMAT}: update cfm_train, or write the artifact again."
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"home"}
        for key in values:
            if key not in known:
                raise UserError(f"{where} has the unknown key '{key}'.{nearest(key, known)}")
        for key in ("name", "kind", "version", "files", "interface"):
            if key not in values:
                raise UserError(f"{where} lacks the key '{key}': the card is damaged.")
        card = cls(**values)
        card.check(where)
        return card

    def check(self, where: str) -> None:
        """Refuses a card whose values have wrong types or would climb out of the library.

        Args:
            where: what to call the card in the error sentence.

        Raises:
            UserError: with the key that is wrong.
        """
        for f in dataclasses.fields(self):
            value, expected = getattr(self, f.name), _TYPES[str(f.type).split("[")[0]]
            if not isinstance(value, expected):
                raise UserError(
                    f"{where}: '{f.name}' must be {f.type}, not {type(value).__name__} "
                    f"{value!r:.60}."
                )
        check_name(self.name)
        if self.version and not _VERSION.fullmatch(self.version):
            raise UserError(f"{where}: '{self.version}' is no version (12 hexadecimal digits).")
        if self.granularity not in GRANULARITIES:
            raise UserError(
                f"{where}: granularity '{self.granularity}' is unknown."
                + nearest(self.granularity, GRANULARITIES)
            )
        for file in self.files:
            check_file_name(file)
        for parent in self.parents:
            if not isinstance(parent, dict) or set(parent) != {"name", "version"}:
                raise UserError(
                    f"{where}: each parent must have a name and a version, not {parent!r}."
                )
            check_name(parent["name"])
            if not _VERSION.fullmatch(str(parent["version"])):
                raise UserError(
                    f"{where}: parent '{parent['name']}' needs a full version of 12 digits."
                )
        try:
            self.to_json()
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: the card cannot be written as JSON ({error}).") from None


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "Path | None": (Path, type(None)),
    "list": (list,),
    "dict": (dict,),
}


def check_name(name: str) -> str:
    """Returns ``name`` if it can be an artifact's name.

    Raises:
        UserError: it is empty, too long, reserved, or has characters that could climb out of the
            library or break an expression.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"'{name}' cannot name an artifact: use up to 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    if name in RESERVED:
        raise UserError(
            f"'{name}' cannot name an artifact: the library keeps that folder for itself."
        )
    return name


def check_file_name(name: str) -> str:
    """Returns ``name`` if it can be a file inside an artifact (flat: no folders, nothing hidden).

    Raises:
        UserError: it is empty, has a folder in it, or has odd characters.
    """
    if not isinstance(name, str) or not _FILE.fullmatch(name) or ".." in name:
        raise UserError(
            f"'{name}' cannot be a file of an artifact: use letters, digits, '.', '_' and '-', no "
            "folders."
        )
    return name


def canonical(value: Any) -> str:
    """One text for one JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
