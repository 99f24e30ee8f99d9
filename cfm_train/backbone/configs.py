"""Comparing the configs of two backbones: which of their keys differ, and which never matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError

#: Config keys that change no logit of a frozen model, or that belong to files rather than to
#: functions.
FREE = frozenset(
    {
        "_name_or_path", "architectures", "bos_token_id", "decoder_start_token_id", "dtype",
        "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "id2label",
        "initializer_range", "label2id", "pad_token_id", "pretraining_tp", "problem_type",
        "sep_token_id", "task_specific_params", "tie_word_embeddings", "torch_dtype",
        "transformers_version", "use_cache",
    }
)  # fmt: skip


def differing(
    one: dict[str, Any], other: dict[str, Any], folder: Path, beside: Path
) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two configs differ, with both values.

    A key that stands in one of them alone may mean its default in the other, which only
    transformers knows: it is imported where that decides, and not else.

    Args:
        one, other: the contents of two ``config.json`` of one ``model_type``.
        folder, beside: where they lie.

    Raises:
        UserError: the installed transformers does not know the architecture.
    """
    if {key for key in one.keys() ^ other.keys() if key not in FREE}:
        one, other = _complete(folder), _complete(beside)
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _complete(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(folder).to_dict())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The config of '{folder}' cannot be read by the installed transformers: "
            f"{str(error).splitlines()[0]}"
        ) from None
