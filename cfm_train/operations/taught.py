"""What a run that teaches facts is made of: a new brick, its groups, and what is measured on it."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from cfm_train.backbone.load import Backbone
    from cfm_train.bricks.fact_gate import Encoder
    from cfm_train.data.encode import Encoded
    from cfm_train.data.facts import Fact
    from cfm_train.data.rows import Row
    from cfm_train.knowledge.teach import Taught
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.tracking.wandb_run import WandbRun


def share(name: str, values: Sequence[float], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """A figure that is the mean of some values, under its name; nothing for no values."""
    import numpy as np

    from cfm_train.evaluation.intervals import paired_interval

    if not values:
        return {}
    given = np.asarray(values)
    return {
        name: paired_interval(given, np.zeros_like(given), bootstrap=bootstrap, seed=seed).as_dict()
    }


def windows(backbone: Backbone, text: str, settings: Mapping[str, Any]) -> Encoded | None:
    """Pieces of a text, evenly over it, none longer than a window; None for no text."""
    from cfm_train.data.encode import Encoded
    from cfm_train.data.encoders import Settings, in_blocks
    from cfm_train.knowledge.teach import prompt_ids

    tokenizer, width = backbone.tokenizer, settings["window_tokens"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, max(1, len(ids) - width), width)
    count = min(len(starts), settings["unrelated_windows"])
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    texts = [str(tokenizer.decode(ids[start : start + width - 1])) for start in chosen]
    read = [(text, prompt_ids(backbone, text)[:width]) for text in texts]
    read = [(text, ids) for text, ids in read if len(ids) > 1]  # one token predicts nothing
    if not read:
        return None
    pieces = [ids for _, ids in read]
    arrays = in_blocks(pieces, pieces, list(range(len(read))), Settings(width, 0, pack=False))
    rows: list[Row] = [{"text": [text], "_at": "data.unrelated"} for text, _ in read]
    return Encoded(arrays, rows, 0, width)


def unplugged(backbone: Backbone, facts: Sequence[Fact]) -> str:
    """Hash of the bare backbone's logits for some facts' prompts."""
    import torch

    from cfm_train.knowledge.teach import prompt_ids

    digest = hashlib.sha256()
    with backbone.slots.plugged([]), torch.inference_mode():
        for fact in facts[:8]:
            ids = torch.tensor([prompt_ids(backbone, fact.prompt)], device=backbone.device)
            logits = backbone.logits(input_ids=ids).float().cpu().contiguous()
            digest.update(logits.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def samples_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples as the record keeps them."""
    return [{**one, "right": one["prediction"] == one["reference"]} for one in samples]


def single(value: float, n: int) -> dict[str, Any]:
    """A figure that is exact."""
    return {"value": value, "low": value, "high": value, "n": n}


def prompts_found(gate: Any, facts: Sequence[Fact]) -> list[int]:
    """What a gate makes of all prompts that facts were taught with."""
    found: list[int] = gate.find([text for fact in facts for text in fact.prompts])
    return found


def sizes(brick: Any) -> dict[str, Any]:
    """Bytes of each fact's own, of its prompts in the gate, and of the maps that facts share."""
    own = shared = 0
    for name, value in brick.tensors().items():
        size = value.numel() * value.element_size()
        own, shared = (own + size, shared) if name in brick.stacked() else (own, shared + size)
    count = len(brick)
    found = {"bytes_per_fact": single(own / count, count)}
    if brick.gate is not None:
        held = brick.gate.tensors()
        size = sum(held[name].nbytes for name in ("vectors", "owner"))
        found["gate_bytes_per_fact"] = single(size / count, count)
    return found | ({"shared_bytes": single(shared, 1)} if brick.shared else {})


def new_brick(
    config: Mapping[str, Any], facts: Sequence[Fact], backbone: Backbone, encoder: Encoder | None
) -> Any:
    """A new brick for facts; every fact starts alike, whatever stands beside it.

    ``encoder`` reads the facts for a kind that is computed from vectors.

    Raises:
        UserError: the backbone is no language model that reads from left to right.
    """
    from cfm_train.bricks.kinds import make_brick
    from cfm_train.training.seeding import reseed

    if backbone.family != "decoder" or backbone.model.get_output_embeddings() is None:
        raise UserError(
            f"Facts are taught to a language model that reads from left to right, and "
            f"'{backbone.id}' is none ({backbone.family}): choose another backbone."
        )
    reseed(config["seed"], "brick")
    brick: Any = make_brick(config["brick"])
    brick.for_facts([fact.taught() for fact in facts])
    return (brick.read(encoder, given(facts)) if brick.shared else brick).build(backbone)


def given(facts: Sequence[Fact]) -> Tensor | None:
    """The vectors that come with facts, ``[facts, width]`` float64; None where none do."""
    import torch

    rows = [fact.vector for fact in facts]
    return torch.tensor(rows, dtype=torch.float64) if facts[0].vector else None


def in_groups(
    config: Mapping[str, Any],
    facts: Sequence[Fact],
    backbone: Backbone,
    brick: Any,
    encoder: Encoder | None,
    folder: Path,
    metrics: MetricsFile,
    wandb: WandbRun,
) -> dict[str, Any]:
    """Teaches group after group, and takes those that an earlier start has finished from disk.

    Facts that share their maps are one group.

    Returns:
        ``seconds`` and ``tokens`` of all sessions, and ``figures``.
    """
    import torch
    from safetensors import safe_open

    from cfm_train.knowledge.teach import contexts

    settings, seed = config["teaching"], config["seed"]
    (folder / "checkpoints").mkdir(exist_ok=True)
    size, done = len(facts) if brick.shared else settings["facts_per_group"], 0
    losses: list[float] = []
    total = {"seconds": 0.0, "tokens": 0}
    front: list[str] | None = None
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        file = folder / "checkpoints" / f"group-{start:06}.safetensors"
        if not file.exists():
            if front is None:
                front = contexts(backbone, settings["contexts"], settings["context_tokens"], seed)
            _teach_group(config, part, backbone, encoder, front, file, start)
        own = brick.state_dict()  # shares the brick's memory
        with safe_open(file, "pt") as stored, torch.no_grad():
            kept = json.loads(stored.metadata()["taught"])
            where = slice(None) if brick.shared else slice(start, start + len(part))
            for name in stored.keys():  # noqa: SIM118 (a file, no mapping)
                own[name][where] = stored.get_tensor(name)
        for step, loss, left in kept["curve"]:
            row = {"train/loss": loss, "train/facts left": left}
            metrics.append(done + step, row)
            wandb.log(done + step, row)
        done += len(kept["curve"])
        losses += kept["losses"]
        total = {key: total[key] + kept[key] for key in total}
    learned = [float(loss < settings["enough"]) for loss in losses]
    print(f"{sum(learned):.0f} of {len(facts)} facts below {settings['enough']} nats per token")
    bootstrap = config["evaluation"]["bootstrap"]
    return {
        **total,
        "figures": share("train/facts learned", learned, bootstrap=bootstrap, seed=seed),
    }


def _teach_group(
    config: Mapping[str, Any],
    facts: Sequence[Fact],
    backbone: Backbone,
    encoder: Encoder | None,
    front: Sequence[str],
    file: Path,
    start: int,
) -> None:
    """Teaches one group and writes it, with its curve, in one piece.

    Raises:
        RuntimeError: a fact's loss is no number any more, or huge.
    """
    from safetensors.torch import save
    from tqdm import tqdm

    from cfm_train.knowledge import teach, teach_shared
    from cfm_train.tracking.atomic import replace_file

    brick = new_brick(config, facts, backbone, encoder)
    teaching: Callable[..., Taught] = teach.teach
    if brick.shared:
        gated = config["gate"]["kind"] != "none"
        teaching = functools.partial(teach_shared.teach_shared, gated=gated)
    curve: list[tuple[int, float, int]] = []
    began = time.monotonic()
    with tqdm(total=config["teaching"]["steps"], leave=False, unit="step") as bar:

        def tick(step: int, loss: float, left: int) -> None:
            curve.append((step, loss, left))
            bar.set_description(f"facts {start + 1} to {start + len(facts)}, {left} to go")
            bar.update()

        found = teaching(
            backbone,
            brick,
            facts,
            config["teaching"],
            learning_rate=config["brick"]["learning_rate"],
            front=front,
            seed=config["seed"],
            tick=tick,
        )
    broken = [f.at for f, loss in zip(facts, found.losses, strict=True) if not loss < 1e4]
    if broken:
        raise RuntimeError(
            f"Teaching diverged at {', '.join(broken[:3])} ({len(broken)} facts in all): lower "
            "brick.learning_rate."
        )
    kept = {"losses": found.losses, "curve": curve, "tokens": found.tokens}
    kept["seconds"] = time.monotonic() - began
    tensors = {name: v.detach().cpu().contiguous() for name, v in brick.named_parameters()}
    replace_file(file, save(tensors, {"taught": json.dumps(kept)}))
