"""Who an encoder is, told before torch: its folder, and a fingerprint of all that decides features.

The fingerprint covers the kind, every parameter but the path, and the content of the files that the
encoder reads; so the same model in another folder is the same encoder. Of code that a person names
(`targets`) it covers the source, and the weights of a module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.backbone.fingerprint import file_hash
from cfm_train.config import signature
from cfm_train.errors import UserError, nearest
from cfm_train.library.card import canonical
from cfm_train.modality.fitting import check_item
from cfm_train.modality.targets import find_target, weights_hash

if TYPE_CHECKING:
    from cfm_train.modality.encoders.encoder import Encoder

ROOM = "modality/encoders"

#: Raised whenever an encoder of the same section would give other features.
FORMAT = 2


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder on this machine.

    Attributes:
        section: kind and parameters, as in ``conf/encoder``.
        folder: where its weights lie; None where it has none.
        fingerprint: who it is, 64 hexadecimal digits.
        modality: what its items are called.
    """

    section: dict[str, Any]
    folder: Path | None
    fingerprint: str
    modality: str

    def describe(self) -> dict[str, Any]:
        """What a card keeps: all but where it lies."""
        known = {key: value for key, value in self.section.items() if key != "path"}
        return known | {"fingerprint": self.fingerprint}

    def open(self) -> Encoder:
        """The encoder itself, frozen."""
        from cfm_train.modality.encoders.encoder import Encoder

        arguments = {key: value for key, value in self.section.items() if key != "kind"}
        made: Encoder = signature.class_of(ROOM, self.section["kind"], Encoder)(**arguments)
        made = made.build(self.folder).freeze()
        made.fingerprint = self.fingerprint
        return made


def find_encoder(section: Mapping[str, Any]) -> FoundEncoder:
    """Finds the encoder that an ``encoder`` section names, without torch.

    Raises:
        UserError: there is no such kind, folder or module.
    """
    section = dict(section)
    kind = str(section["kind"])
    known = signature.kinds(ROOM, "Encoder")
    if kind not in known:
        raise UserError(f"encoder.kind: there is no encoder kind '{kind}'.{nearest(kind, known)}")
    folder = _folder(section.get("path"))
    content: dict[str, Any] = {k: v for k, v in section.items() if k != "path"}
    content |= {"format": FORMAT, "files": _files(folder)}
    if section.get("target"):
        target = find_target(str(section["target"]))
        content |= {"source": target.source(), "weights": weights_hash(target)}
    digest = hashlib.sha256(canonical(content).encode()).hexdigest()
    facts = signature.constants(ROOM, kind, "Encoder")
    modality = section.get("modality") or facts.get("modality", "image")
    return FoundEncoder(section, folder, digest, str(modality))


def looks(encoders: Mapping[str, FoundEncoder]) -> Callable[[str, bytes, str], None]:
    """What refuses an item that its encoder cannot read, see `items.read_rows`; without torch.

    Args:
        encoders: those of a run, one for each modality.
    """
    sections = {one.modality: one.section for one in encoders.values()}
    return lambda kind, content, at: check_item(sections[kind], content, at)


def _folder(path: Any) -> Path | None:
    if path is None:
        return None
    from cfm_train.backbone.spec import find_folder

    return find_folder(str(path), None, key="encoder.path")


def _files(folder: Path | None) -> dict[str, str]:
    """The hash of every file that can change what an encoder in a folder does."""
    if folder is None:
        return {}
    names = ["config.json", "preprocessor_config.json"]
    files = [folder / name for name in names if (folder / name).is_file()]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"encoder.path: {folder} holds no weights as safetensors; give the folder that "
            "save_pretrained() wrote."
        )
    return {file.name: file_hash(file) for file in [*files, *weights]}
