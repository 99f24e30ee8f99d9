"""The Python door: a transformers model with bricks plugged in.

    model = cfm_train.load("minilm", "sst2@1f2c")
    pipeline("text-classification", model=model, tokenizer=model.tokenizer)("What a film!")

A brick with one head gives a model with that head; without one (language models) it is the
backbone's own class, so `generate` works as always.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfm_train.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    backbone: str | Mapping[str, Any],
    configuration: str | None = None,
    *,
    head: str | None = None,
    library: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> PreTrainedModel:
    """Loads a backbone and plugs a configuration of bricks into it.

    Args:
        backbone: a name from ``conf/backbone`` (``minilm``), a local folder, a Hub id, or a mapping
            with keys of a ``backbone`` section.
        configuration: a brick (``sst2``, ``sst2@1f2c``) or an expression over bricks
            (``merge(linear, [sst2, trec])``); None for the bare backbone.
        head: which head answers, where the configuration has several.
        library: the library's folder; ``$CFM_LIBRARY`` or ``outputs/library`` otherwise.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: where it runs; a GPU where there is one.

    Returns:
        A transformers model in eval mode with attributes ``tokenizer`` and ``backbone``
        (`cfm_train.backbone.load.Backbone`); ``backbone.slots`` plugs and unplugs.

    Raises:
        UserError: backbone, brick or head cannot be found, or they do not fit each other.
    """
    import torch

    from cfm_train.backbone.load import load_backbone
    from cfm_train.backbone.spec import resolve
    from cfm_train.configuration.apply import assemble
    from cfm_train.configuration.parser import parse
    from cfm_train.library.store import Library

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    section = _section(backbone)
    chosen_dtype = section["dtype"] if dtype == "auto" else dtype
    loaded = load_backbone(resolve(section), dtype=chosen_dtype, device=where)
    chosen = None
    if configuration is not None:
        shelf = Library(library or os.environ.get("CFM_LIBRARY") or "outputs/library")
        brick = assemble(parse(configuration), shelf, loaded)
        loaded.slots.plug([brick])
        chosen = _head(brick, head, configuration)
    elif head is not None:
        raise UserError(f"head '{head}' belongs to a brick: name the brick too.")
    if chosen is None:
        model: Any = loaded.model
    else:
        from cfm_train.bricks.headed import headed_model

        model = headed_model(loaded, chosen)
    # Past nn.Module's own __setattr__: the backbone holds the model, not the other way round.
    object.__setattr__(model, "backbone", loaded)
    object.__setattr__(model, "tokenizer", loaded.tokenizer)
    return model


def _section(backbone: str | Mapping[str, Any]) -> dict[str, Any]:
    from cfm_train.config.catalogue import groups
    from cfm_train.config.compose import option

    if isinstance(backbone, Mapping):
        section = option("backbone", "hf", path=backbone.get("path"))
        for key in backbone:
            if key not in section:
                raise UserError(f"A backbone section has no key '{key}'.{nearest(key, section)}")
        return {**section, **backbone}
    if backbone in groups()["backbone"] and backbone != "hf":
        return option("backbone", backbone)
    return option("backbone", "hf", path=backbone)


def _head(brick: Any, head: str | None, configuration: str) -> Any:
    names = list(brick.heads)
    if head is None:
        if len(names) > 1:
            raise UserError(
                f"'{configuration}' has the heads {', '.join(names)}: choose one with head=…"
            )
        return brick.heads[names[0]] if names else None
    if head not in names:
        raise UserError(f"'{configuration}' has no head '{head}'.{nearest(head, names)}")
    return brick.heads[head]
