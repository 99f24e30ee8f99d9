"""Bricks on the Hugging Face Hub: one repository for each name, one tag for each version.

What is pushed is the artifact as it lies in the library: its model card is the repository's page,
and PEFT loads a brick of a PEFT kind from there as from any adapter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfm_train.errors import UserError
from cfm_train.library.card import Card
from cfm_train.library.folders import pull, push
from cfm_train.library.gate import ENDINGS
from cfm_train.library.store import Library


def is_hub_id(place: str) -> bool:
    """Whether a place means the Hub: ``organisation/name`` that is no folder here."""
    parts = place.split("/")
    plain = not place.startswith((".", "~", "/")) and len(parts) == 2 and all(parts)
    return plain and not Path(place).exists()


def push_to_hub(library: Library, card: Card, repository: str, *, private: bool) -> str:
    """Puts an artifact into a Hub repository, made if it is not there yet.

    Args:
        library: holds the artifact.
        card: the artifact's card.
        repository: ``organisation/name``.
        private: whether a new repository is private.

    Returns:
        The address of its page.

    Raises:
        UserError: no network, no login, or no right to write there.
    """
    with tempfile.TemporaryDirectory() as temporary, _explained(repository):
        from huggingface_hub import HfApi

        folder = Path(temporary) / card.name
        push(library, card, folder)
        api = HfApi()
        page = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=card.ref)
        api.create_tag(repository, tag=card.version, exist_ok=True)
    return str(page)


def pull_from_hub(
    library: Library, repository: str, *, revision: str | None, name: str | None
) -> Card:
    """Takes the artifact of a Hub repository into the library.

    Args:
        library: where to.
        repository: ``organisation/name``.
        revision: a version, tag or commit; the newest if None.
        name: the name to give it, its own if None.

    Raises:
        UserError: no network, no such repository, or not an artifact.
    """
    with tempfile.TemporaryDirectory() as temporary:
        with _explained(repository):
            from huggingface_hub import snapshot_download

            snapshot_download(
                repository,
                revision=revision,
                local_dir=temporary,
                allow_patterns=[f"*{ending}" for ending in ENDINGS],
            )
        return pull(library, Path(temporary), name)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """One sentence for whatever the Hub's client raises: its errors share no base class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The Hub repository '{repository}' could not be reached ({type(error).__name__}: "
            f"{reason[:120]}): check the network, the spelling and your login (hf auth login), or "
            f"use a folder such as ./{repository.rsplit('/', 1)[-1]}."
        ) from error
