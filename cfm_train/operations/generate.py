"""Let a language model with any bricks answer a prompt, with items of other modalities in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError
from cfm_train.modality.finding import FoundEncoder, looks
from cfm_train.modality.forms import ITEM
from cfm_train.operations.eyes import encoders_of, open_bricks
from cfm_train.operations.selection import Selection, select
from cfm_train.tracking.wandb_setting import resolve_mode

#: A finished run is run again: what a person wants is the answer.
AGAIN = True

#: The keys that name a file, and what its item is called; ``item`` stands for any other name.
MODALITIES = ("image", "audio", "features", "series", "table", "item")


@dataclass(frozen=True)
class Inputs:
    """What `check` found.

    Attributes:
        selection: bricks and backbone.
        encoders: the encoders of the modality bricks, by reference.
        items: modality -> the file's bytes.
        prompt: the prompt, with a marker for every item.
        fingerprints: content hashes for the config hash.
    """

    selection: Selection
    encoders: dict[str, FoundEncoder]
    items: dict[str, bytes]
    prompt: str
    fingerprints: dict[str, str]


def check(config: dict[str, Any]) -> Inputs:
    """Finds bricks, encoders and files, without torch.

    Raises:
        UserError: the first thing that is wrong.
    """
    import hashlib

    resolve_mode(config["tracking"]["mode"])
    selection = select(config)
    encoders = encoders_of(selection, config["encoder"])
    look = looks(encoders)
    known = {encoder.modality for encoder in encoders.values()}
    prompt, items = _placed(config, known), {}
    fingerprints = dict(selection.fingerprints)
    for key, modality in _called(known).items():
        if config[key] is None:
            if f"<{modality}>" in prompt and modality in known:
                raise UserError(f"The prompt asks for <{modality}>: give {key}=FILE.")
            continue
        if modality not in known:
            what = f"they read {' and '.join(sorted(known))}" if known else "none reads anything"
            raise UserError(f"{key}: no brick reads <{modality}>; {what} but text.")
        path = Path(config[key]).expanduser()
        if not path.is_file():
            raise UserError(f"{key}: there is no file {path}.")
        items[modality] = path.read_bytes()
        look(modality, items[modality], str(config[key]))
        fingerprints[modality] = hashlib.sha256(items[modality]).hexdigest()
        marker = f"<{modality}>"
        if marker not in prompt:
            prompt = f"{marker}{prompt}"
        if prompt.count(marker) > 1:
            raise UserError(f"The prompt has several {marker}, and there is one file.")
    return Inputs(selection, encoders, items, prompt, fingerprints)


def _placed(config: dict[str, Any], known: set[str]) -> str:
    """The prompt, ``<item>`` in it replaced by what is given, as rows have it in training.

    Raises:
        UserError: it has a place, and nothing is given for it.
    """
    prompt = str(config["prompt"])
    if ITEM not in prompt or not known or ITEM.strip("<>") in known:
        return prompt
    called = _called(known).items()
    given = [kind for key, kind in called if config[key] is not None and kind in known]
    if not given:
        keys = [f"{key}=FILE" for key, kind in called if kind in known]
        raise UserError(f"The prompt asks for {ITEM}: give {' or '.join(keys)}.")
    return prompt.replace(ITEM, "".join(f"<{kind}>" for kind in given))


def _called(known: set[str]) -> dict[str, str]:
    """Key -> what its item is called; ``item`` is what the one brick of another name reads."""
    others = sorted(known - set(MODALITIES))
    names = {key: key for key in MODALITIES}
    return names | ({"item": others[0]} if len(others) == 1 else {})


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Generates and prints the answer; returns the record's own part."""
    import time

    from cfm_train.modality.encoding import given, prompt_ids
    from cfm_train.modality.writing import generate
    from cfm_train.operations.setting import backbone_entries, open_backbone, unchanged
    from cfm_train.training.cost import peak_memory

    selection = inputs.selection
    backbone, before = open_backbone(selection.backbone, selection.section)
    bricks, reading = open_bricks(selection, backbone)
    batch: dict[str, Any] = {}
    held: dict[str, list[list[int]]] = {}
    for ref, brick in reading.items():
        if brick.modality not in inputs.items:
            continue
        encoder = inputs.encoders[ref].open().to(backbone.device)
        key = brick.modality if brick.modality in MODALITIES else "item"
        item = encoder.load(inputs.items[brick.modality], str(config[key]))
        features, mask = encoder.encode([item])
        found = features[0][mask[0]].cpu().numpy()
        batch |= given(brick.modality, [[found]])
        held[f"<{brick.modality}>"] = [[brick.sentinel] * brick.count(len(found))]
    prompt = prompt_ids(inputs.prompt, backbone.tokenizer, held)
    started = time.perf_counter()
    with backbone.slots.plugged(bricks):
        said = generate(backbone, prompt, batch, config["max_new_tokens"])
    seconds = time.perf_counter() - started
    print(said, flush=True)
    same = unchanged(backbone, before, selection.backbone)
    return {
        **backbone_entries(backbone, same),
        "samples": [{"input": inputs.prompt, "prediction": said, "reference": ""}],
        "cost": {
            "samples_per_second": 1 / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(),
        },
    }
