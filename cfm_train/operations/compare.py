"""Put bricks side by side: their matrix with the bounds, drawn with the runs that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfm_train.operations import evaluate
from cfm_train.operations.evaluate import Inputs

check = evaluate.check


def run(config: dict[str, Any], inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Evaluates, and names the records of the bricks' own runs for the dashboard."""
    record = evaluate.run(config, inputs, folder)
    runs = Path(config["outputs"]).absolute() / "runs"
    made_by = {card.run for card in inputs.selection.cards.values()}
    found = sorted(p for p in runs.glob("*/*/record.json") if p.parent.name in made_by)
    return {**record, "drawn_with": [str(path) for path in found]}
