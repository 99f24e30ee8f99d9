"""Where the tensors of a backbone lie, from the headers of its files: nothing is read, no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cfm_train.backbone.spec import ResolvedBackbone
from cfm_train.errors import UserError
from cfm_train.library.tensorfile import TensorInfo, pieces, read_header

#: A tensor of a layer: what stands before the layer's number, the number, the rest of the name.
NUMBERED = re.compile(r"(?P<stack>(?:[^.\d][^.]*\.)*?[^.\d][^.]*)\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Placed:
    """A tensor and the file that it lies in."""

    file: Path
    info: TensorInfo

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.info.end - self.info.begin


def placed_tensors(backbone: ResolvedBackbone) -> dict[str, Placed]:
    """Every tensor of a backbone by name, whatever files it is spread over.

    Raises:
        UserError: a file is damaged, or two of them hold one tensor.
    """
    placed: dict[str, Placed] = {}
    for path in backbone.files:
        with path.open("rb") as file:
            for name, info in read_header(file, str(path)).items():
                if name in placed:
                    raise UserError(
                        f"The backbone '{backbone.id}' has the tensor '{name}' twice, in "
                        f"'{placed[name].file.name}' and '{path.name}': fetch it again."
                    )
                placed[name] = Placed(path, info)
    return placed


def size_of(tensors: Mapping[str, Placed]) -> int:
    """Bytes of all tensors together."""
    return sum(placed.size for placed in tensors.values())


def content_of(tensors: Mapping[str, Placed]) -> str:
    """SHA-256 of names, dtypes, shapes and values: the same however the tensors lie in files.

    Reads all of them, so it is for who needs just that; a backbone's fingerprint is cached.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        placed = tensors[name]
        total.update(f"{name} {placed.info.dtype} {placed.info.shape}\n".encode())
        with placed.file.open("rb") as file:
            for piece in pieces(file, placed.info):
                total.update(piece)
    return total.hexdigest()


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers in a checkpoint, from the names of its tensors.

    Args:
        names: the tensors' names.

    Returns:
        What stands before the layer's number -> how many layers there are, for every group of
        names that differ by a number which counts from 0 without a gap.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        if match := NUMBERED.fullmatch(name):
            found.setdefault(match["stack"], set()).add(int(match["layer"]))
    return {stack: len(n) for stack, n in found.items() if n == set(range(len(n)))}
