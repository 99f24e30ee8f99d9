"""Bridges in and out of the library: a card of kind ``bridge`` becomes a language model again.

model = load_stitched(library.find("bridge"), library)
logits = model(input_ids, attention_mask).logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfm_train.backbone.fingerprint import fingerprint
from cfm_train.backbone.load import load_backbone
from cfm_train.backbone.named import backbone_section
from cfm_train.backbone.spec import resolve
from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.card import Card
from cfm_train.library.store import Library
from cfm_train.stitching.layers.bridge import Bridge
from cfm_train.stitching.layers.stitched import StitchedBackbone, StitchedModel

KIND = "bridge"


def store_bridge(
    bridge: Bridge, library: Library, backbone: StitchedBackbone, **known: Any
) -> Card:
    """Puts a bridge into the library.

    Args:
        bridge: the bridge, fitted or trained.
        library: where to.
        backbone: the two half models that it joins.
        **known: more fields of the card: ``name``, ``recipe``, ``metrics``, …
    """
    interface = bridge.interface()
    ends = [
        f"{interface[half]['backbone']}:{'-'.join(map(str, interface[half]['layers']))}"
        for half in ("bottom", "top")
    ]
    card = Card(
        kind=KIND,
        granularity=bridge.granularity,
        sites=list(bridge.site_names),
        requires=[print_ for _, print_ in backbone.parts],
        backbone_id=backbone.id,
        operation="stitch",
        expression=f"stitch([{', '.join(ends)}])",
        interface=interface,
        **known,
    )
    return library.add(bridge.files(), card)


def load_stitched(
    card: Card,
    library: Library,
    *,
    bottom: str | Path | None = None,
    top: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> StitchedModel:
    """A stitched language model from the card of its bridge.

    Args:
        card: of kind ``bridge``.
        library: where it lies.
        bottom, top: folder, Hub id or name of the two models; what the card's run was given else.
        dtype: of the two models.
        device: where it runs.

    Returns:
        The model, frozen, with its bridge plugged in; ``model.backbone`` is the
        `StitchedBackbone` around it, ``model.tokenizer`` the tokenizer.

    Raises:
        UserError: the card is of no bridge, a model is missing or another one, or the tensors are
            not what the card says.
    """
    backbone, bridge = open_stitched(
        card, library, bottom=bottom, top=top, dtype=dtype, device=device
    )
    backbone.slots.plug([bridge])
    model: Any = backbone.model
    # Past nn.Module's own __setattr__: the backbone holds the model, not the other way round.
    object.__setattr__(model, "backbone", backbone)
    object.__setattr__(model, "tokenizer", backbone.tokenizer)
    stitched: StitchedModel = model
    return stitched


def open_stitched(
    card: Card,
    library: Library,
    *,
    bottom: str | Path | None,
    top: str | Path | None,
    dtype: str,
    device: str,
) -> tuple[StitchedBackbone, Bridge]:
    """The two half models and the bridge of a card, not plugged in; see `load_stitched`."""
    if card.kind != KIND:
        raise UserError(f"{card.ref} is of kind {card.kind}, not a bridge between two models.")
    gate.check_artifact(card, library.folder(card))
    halves = []
    for key, given in (("bottom", bottom), ("top", top)):
        where = given or card.recipe.get(key)
        if not where:
            raise UserError(f"{card.ref} does not say where its {key} lies: name it, {key}=….")
        resolved = resolve(backbone_section(str(where)))
        found, wanted = fingerprint(resolved.folder), card.interface[key]["fingerprint"]
        if found != wanted:
            raise UserError(
                f"{card.ref} needs '{card.interface[key]['backbone']}' (fingerprint {wanted[:12]}) "
                f"as its {key}, but '{resolved.id}' has fingerprint {found[:12]}: name the right "
                "model."
            )
        halves.append(load_backbone(resolved, dtype=dtype, device=device))
    i, j = card.interface["hyper"]["at"]
    backbone = StitchedBackbone(halves[0], halves[1], (i, j))
    folder = library.folder(card)
    files = {name: (folder / name).read_bytes() for name in card.files}
    bridge = Bridge.restore(card.interface, files, backbone)
    return backbone, bridge.to(backbone.device).eval().requires_grad_(False)
