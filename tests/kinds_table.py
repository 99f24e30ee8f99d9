"""What each brick of ``conf/brick`` keeps on each family: measured, and drawn for docs/bricks.md.

32 16     a new brick changes nothing, to the bit, in float32 and in bfloat16
exact     unplugging gives back the bare backbone to the bit, in both; its weights never move
PEFT      the brick's files load in PEFT, and PEFT's come back here, with equal logits (1e-5)
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.brick import Brick
from cfm_train.bricks.kinds import brick_class, make_brick
from cfm_train.bricks.peft_options import REFUSED
from cfm_train.bricks.task_vector import TaskVector
from cfm_train.config.catalogue import groups
from cfm_train.errors import UserError
from cfm_train.library.peft_format import CONFIG_FILE, read_folder
from tests import brick_laws as laws
from tests.backbones import FAMILIES, VOCABULARY, bare, batch, randomise, tiny
from tests.peft_peers import in_peft, values
from tests.peft_tuners import section, small

START = "<!-- measured and written by tests/bricks/test_kinds_table.py -->"
END = "<!-- end of what is measured -->"
HEADINGS = {"bert": "BERT", "llama": "Llama", "gpt2": "GPT-2", "t5": "T5"}
#: Why a brick is refused, in the table's own words: a piece of the sentence and what it means.
REASONS = {
    "Conv1D": "PEFT does not adapt GPT-2's Conv1D",
    "no linear map or norm with a parameter": "it has no such parameters",
    "computed from facts": "it is computed from facts",
    "left to right": "it needs a language model that reads from left to right",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One brick on one family.

    Attributes:
        refused: why it does not run there, else None.
        identity: whether a new brick changes nothing, in float32 and in bfloat16.
        exact: whether unplugging is exact in both and the backbone's weights are what they were.
        peft: ``both`` ways, ``written`` for PEFT alone, or None for a format of our own.
    """

    refused: str | None = None
    identity: tuple[bool, bool] = (False, False)
    exact: bool = False
    peft: str | None = None

    def text(self) -> str:
        """The cell as it stands in the table."""
        if self.refused is not None:
            return f"refused: {self.refused}"
        start = " ".join(["32"] * self.identity[0] + ["16"] * self.identity[1]) or "–"
        peft = {"both": "PEFT", "written": "PEFT reads it", None: "own format"}[self.peft]
        return f"{start} · {'exact' if self.exact else 'NOT EXACT'} · {peft}"


def names() -> list[str]:
    """Every brick of ``conf/brick``: our own kinds first, then PEFT's tuners."""
    found = groups()["brick"]
    return sorted(found, key=lambda name: (kind_of(name) == "peft", name))


def kind_of(name: str) -> str:
    """The kind that a brick's YAML names."""
    return str(section(name)["kind"])


def fresh(name: str, backbone: Backbone) -> Brick:
    """A new brick, in a size that fits the tiny backbones."""
    torch.manual_seed(0)
    chosen = small(name) if kind_of(name) == "peft" else section(name)
    text = torch.randint(3, VOCABULARY, (36,))  # for kinds that start from a text
    return make_brick(chosen).about(text[: chosen.get("tokens") or 20]).build(backbone).eval()


def measure(name: str, family: str) -> Cell:
    """One cell of the table."""
    identity, exact = [], True
    for dtype in ("float32", "bfloat16"):
        backbone = tiny(family, dtype)
        try:
            brick = fresh(name, backbone)
        except UserError as error:
            return Cell(refused=reason(str(error)))
        inputs, checksum = batch(backbone, rows=12, length=24), backbone.checksum()
        before = bare(backbone, inputs)
        same = torch.equal(laws.plugged(backbone, [brick], inputs), before)
        # Where float32 differs, bfloat16 may round the difference away: that is no identity.
        identity.append(same and brick.trains and all(identity))
        act(brick, backbone, inputs)
        changed = laws.plugged(backbone, [brick], inputs)
        assert name == "head" or (changed - before).abs().max() > 1e-3
        after = bare(backbone, inputs)
        exact = exact and torch.equal(after, before) and backbone.checksum() == checksum
    return Cell(None, (identity[0], identity[1]), exact, in_pefts_format(name, family))


def act(brick: Brick, backbone: Backbone, inputs: dict[str, Tensor]) -> None:
    """Gives a brick values with which it does something."""
    randomise(brick)
    if isinstance(brick, TaskVector):
        brick.hold("layer.0", torch.randn(backbone.hidden_size), [int(inputs["input_ids"][0, 3])])


def reason(sentence: str) -> str:
    """A refusal in a few words."""
    known = [words for piece, words in REASONS.items() if piece in sentence]
    assert known, f"name this refusal in REASONS: {sentence}"
    return known[0]


def in_pefts_format(name: str, family: str) -> str | None:
    """How far a brick and PEFT read each other's files: ``both``, ``written`` or None."""
    backbone = tiny(family)
    brick = fresh(name, backbone)
    randomise(brick)
    if CONFIG_FILE not in brick.body_files():
        return None
    inputs = batch(backbone)
    inputs["attention_mask"].fill_(1)
    inputs["input_ids"].clamp_(min=3)
    ours = laws.plugged(backbone, [brick], inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        theirs = values(in_peft(brick, family, path), inputs)[:, -ours.shape[1] :]
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
        adapter = read_folder(path)
        if adapter.kind != brick.kind:
            return "written"
        files = {at: file.read_bytes() for at, file in adapter.files.items()}
    again = brick_class(adapter.kind).restore(adapter.interface, files, backbone).eval()
    found: Tensor = laws.plugged(backbone, [again], inputs)
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)
    return "both"


def draw(cells: dict[tuple[str, str], Cell]) -> str:
    """The table as Markdown, with its markers."""
    lines = [
        "| `brick=` | kind | " + " | ".join(HEADINGS[family] for family in FAMILIES) + " |",
        "|---|---|" + "---|" * len(FAMILIES),
    ]
    for name in names():
        row: list[Any] = [f"`{name}`", kind_of(name)]
        row += [cells[name, family].text() for family in FAMILIES]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "PEFT's tuners that do not run as bricks:", ""]
    lines += [f"- `{tuner}`: {why}." for tuner, why in sorted(REFUSED.items())]
    return "\n".join([START, "", *lines, "", END])
