"""What may be loaded: safetensors that are whole, finite and what their card says, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, overload

from cfm_train.errors import UserError
from cfm_train.library.card import Card, check_file_name
from cfm_train.library.tensorfile import TensorInfo, check_finite, read_header, to_numpy

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Endings of the files that an artifact may hold; everything else, above all code, is refused.
ENDINGS = (".safetensors", ".json", ".md", ".txt", ".model", ".jinja")
#: Formats that run code when loaded, or can.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")

_PIECE = 1 << 22


def check_tensors(path: str | Path, where: str = "") -> dict[str, TensorInfo]:
    """Checks the header and every value of a safetensors file; returns what is in it.

    Args:
        path: the file.
        where: what to call it in the error sentence; its path if empty.

    Raises:
        UserError: there is no such file, it is not sound, or it holds a NaN or an infinity.
    """
    path, where = Path(path), where or str(path)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"There is no file {path}.") from None
    with file:
        tensors = read_header(file, where)
        for tensor in tensors.values():
            check_finite(file, tensor, where)
    return tensors


@overload
def read_tensors(path: str | Path, framework: Literal["pt"] = "pt") -> dict[str, torch.Tensor]: ...
@overload
def read_tensors(path: str | Path, framework: Literal["np"]) -> dict[str, np.ndarray]: ...
def read_tensors(path: str | Path, framework: str = "pt") -> dict[str, Any]:
    """Reads the tensors of a file after it has passed the gate.

    Args:
        path: a safetensors file.
        framework: ``"pt"`` for torch tensors as they are stored; ``"np"`` for arrays, without
            torch, where bfloat16 comes as float32 of the same values.

    Returns:
        The tensors by name, in memory of their own.

    Raises:
        UserError: the file is missing, damaged, not finite, or has a dtype that NumPy lacks.
    """
    infos = check_tensors(path)
    if framework == "pt":
        from safetensors.torch import load_file

        return load_file(path)
    with Path(path).open("rb") as file:
        return {name: to_numpy(file, info, str(path)) for name, info in infos.items()}


def check_file(name: str, where: str) -> None:
    """Refuses a file that no artifact may hold.

    Args:
        name: the file's name.
        where: the folder or the artifact that it belongs to.

    Raises:
        UserError: it is a pickle (or can run code in another way), or is of no known kind.
    """
    if name.lower().endswith(PICKLES):
        raise UserError(
            f"'{name}' of {where} is a pickle or its kin, which can run code when loaded: save "
            "the tensors as safetensors (PEFT: save_pretrained(folder); torch: "
            "safetensors.torch.save_file)."
        )
    check_file_name(name)
    if not name.endswith(ENDINGS):
        raise UserError(
            f"'{name}' of {where} cannot be in an artifact, which holds {', '.join(ENDINGS)} files."
        )


def hash_of(file: IO[bytes]) -> str:
    """SHA-256 of an open file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def check_files(card: Card, place: str, opener: Callable[[str], IO[bytes]]) -> None:
    """Refuses an artifact whose files are not the ones that its card names.

    Args:
        card: the artifact's card.
        place: what to call the artifact's folder in the error sentence.
        opener: opens a file of the artifact by its name.

    Raises:
        UserError: a file is missing or has changed since it was written.
    """
    for name, expected in card.files.items():
        check_file(name, card.ref)
        try:
            with opener(name) as file:
                found = hash_of(file)
        except FileNotFoundError:
            raise UserError(
                f"{card.ref} lacks its file {place}/{name}: add or train it again."
            ) from None
        if found != expected:
            raise UserError(
                f"{place}/{name} has changed since {card.ref} was written (its SHA-256 begins "
                f"with {found[:12]}, the card says {expected[:12]}): add or train it again."
            )


def check_artifact(card: Card, folder: Path) -> None:
    """Everything that must hold before the tensors of an artifact are used.

    Args:
        card: the artifact's card, from `Library.find`.
        folder: where its files lie, from `Library.folder`.

    Raises:
        UserError: a file is missing, changed, not sound, or not finite.
    """
    check_files(card, str(folder), lambda name: (folder / name).open("rb"))
    for name in card.files:
        if name.endswith(".safetensors"):
            check_tensors(folder / name, f"{name} of {card.ref}")


def require_brick(card: Card) -> None:
    """Refuses an artifact that is no brick and cannot be plugged into one backbone.

    Raises:
        UserError: it is a backbone of its own, or a bridge between two.
    """
    if card.kind == "backbone":
        raise UserError(
            f"{card.ref} is a backbone, not a brick: train bricks over it with backbone=hf "
            f"backbone.path=FOLDER (its weights lie in the folder '{card.backbone_id}')."
        )
    if card.kind == "bridge":
        raise UserError(
            f"{card.ref} joins two models ({card.backbone_id}) and is no brick of one: open it "
            "with load_stitched of cfm_train.stitching.layers.stored."
        )


def require_backbone(card: Card, fingerprint: str, backbone_id: str = "") -> None:
    """Refuses a brick of another backbone.

    Args:
        card: the brick's card; the first that it requires is its backbone, what follows is needed
            beside it (the sentence encoder of a brick of facts, the encoder of a modality).
        fingerprint: of the backbone at hand.
        backbone_id: what a person calls the backbone at hand.

    Raises:
        UserError: the card requires another backbone (both are named), or is of no brick.
    """
    require_brick(card)
    if card.requires and fingerprint != card.requires[0]:
        raise UserError(
            f"{card.ref} was made for the backbone '{card.backbone_id or 'unknown'}' (fingerprint "
            f"{card.requires[0][:12]}) and does not fit '{backbone_id or 'this one'}' (fingerprint "
            f"{fingerprint[:12]}): use a brick of this backbone, or run it on its own."
        )
