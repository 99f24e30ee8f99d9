"""Who an artifact is: the start of the SHA-256 of its tensors and its interface, nothing else.

The order of tensors, metadata in a file's header, the recipe and the time do not count: the same
parameters in the same interface are the same version wherever and whenever they were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack

from cfm_train.library.card import Card, canonical
from cfm_train.library.storage import Content, opened
from cfm_train.library.tensorfile import check_finite, pieces, read_header

LENGTH = 12


def version_of(files: Mapping[str, Content], card: Card) -> str:
    """The version of an artifact; all its tensors are checked on the way.

    Args:
        files: the artifact's files; only ``*.safetensors`` count, each tensor with its file's name
            (a brick and its heads may use one name twice), dtype, shape and bytes.
        card: gives the interface (`Card.identity`) and a name for the error sentence.

    Returns:
        12 hexadecimal digits.

    Raises:
        UserError: a file is not sound, or a tensor is not finite.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        tensors = []
        for name, content in files.items():
            if name.endswith(".safetensors"):
                where = f"{name} of '{card.name}'"
                file = stack.enter_context(opened(content))
                for tensor in read_header(file, where).values():
                    check_finite(file, tensor, where)
                    tensors.append((name, tensor, file))
        for name, tensor, file in sorted(tensors, key=lambda entry: (entry[0], entry[1].name)):
            line = [f"{name}/{tensor.name}", tensor.dtype, list(tensor.shape)]
            digest.update(canonical(line).encode() + b"\n")
            for piece in pieces(file, tensor):
                digest.update(piece)
    digest.update(canonical(card.identity).encode())
    return digest.hexdigest()[:LENGTH]
