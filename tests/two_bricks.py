"""Two small bricks of classifiers, trained by commands alone, for tests of what is made of them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfm_train.launch.cli import main
from tests.backbones import folder
from tests.tasks import raw_row


def command(capsys: Any, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs a command; its record and what it printed."""
    capsys.readouterr()
    code = main([*arguments, "tracking=disabled"])
    out, err = capsys.readouterr()
    assert code == 0, err[-3000:]
    return json.loads(Path(out.splitlines()[-1].removeprefix("record: ")).read_text()), out


@contextmanager
def two_bricks(place: Path, *more: str) -> Iterator[Path]:
    """The working folder ``place`` with bricks ``a`` and ``b``, each with its task's files.

    Args:
        place: an empty folder.
        more: overrides of both trainings.
    """
    before, library = Path.cwd(), os.environ.pop("CFM_LIBRARY", None)
    os.chdir(place)
    try:
        for seed, name in enumerate("ab"):
            draw = random.Random(name)
            for split, count in (("train", 60), ("test", 16)):
                rows = [raw_row("classification", draw) for _ in range(count)]
                text = "\n".join(map(json.dumps, rows)) + "\n"
                Path(f"{name}.{split}.jsonl").write_text(text)
            arguments = [
                "recipe=task/classify", f"name={name}", f"seed={seed}", "backbone=hf",
                f"backbone.path={folder('bert')}", f"data.train={name}.train.jsonl",
                f"data.test={name}.test.jsonl", "data.validation_fraction=0.3",
                "trainer.max_steps=3", "trainer.samples=0", "evaluation.bootstrap=20",
                "tracking=disabled", *more,
            ]  # fmt: skip
            assert main(arguments) == 0
        yield place
    finally:
        os.chdir(before)
        if library is not None:
            os.environ["CFM_LIBRARY"] = library
