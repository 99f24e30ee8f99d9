"""What `domains.py` trains and asks: LoRA bricks, whole models, and their loss on texts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.carried import run

if TYPE_CHECKING:
    import numpy as np

    from cfm_train.knowledge.tokens import Reader

#: Most characters of a domain that the other's brick shall leave as they are.
KEPT = 300_000
SITES = "attn.q,attn.k,attn.v,attn.o,ffn.gate,ffn.up,ffn.down"


def texts(options: argparse.Namespace, name: str) -> dict[str, Path]:
    """What is learnt, what chooses, what is judged, and what another domain's brick shall leave as
    it is: files of their own, cut at line ends."""
    root = Path(options.root)
    train = (root / f"{name}.train.txt").read_text(encoding="utf-8")
    valid = (root / f"{name}.valid.txt").read_text(encoding="utf-8")
    parts = {
        "learnt": train[: options.characters].rpartition("\n")[0],
        "chosen": train[-options.held :].partition("\n")[2],
        "judged": valid[: options.judged or None],
        "kept": train[: min(options.characters, KEPT)].rpartition("\n")[0],
    }
    assert options.characters + options.held <= len(train), "the two parts would overlap"
    found = {}
    for part, text in parts.items():
        found[part] = Path(options.work) / f"{name}.{part}.txt"
        found[part].parent.mkdir(parents=True, exist_ok=True)
        found[part].write_text(text, encoding="utf-8")
    return found


def brick(
    options: argparse.Namespace,
    name: str,
    document: Path,
    rate: float,
    *,
    steps: int,
    beside: str = "",
    kept: Path | None = None,
) -> str:
    """A LoRA brick of a domain; its name in the library.

    Args:
        options: the benchmark's.
        name: the domain.
        document: its text.
        rate: learning rate.
        steps: of training.
        beside: another brick, plugged in beside it half of the time.
        kept: text that the brick shall leave as it is.
    """
    called = f"{name}-{rate:g}-{steps}"
    called += f"-beside-{beside[:3]}" if beside else ""
    called += f"-keep-{options.keep:g}" if kept else ""
    run(
        options,
        "recipe=knowledge/lora",
        f"name={called}",
        f"data.documents={document}",
        "data.most_questions=24",
        "data.context=64",
        "evaluation.generate=false",
        "evaluation.bootstrap=20",
        "objective.learn=[documents]",
        f"trainer.max_steps={steps}",
        f"trainer.validate_every={steps}",
        f"trainer.tokens_per_batch={options.tokens}",
        f"brick.rank={options.rank}",
        f"brick.sites=[{SITES}]",
        f"brick.learning_rate={rate}",
        *([f"distractors=[{beside}]"] if beside else []),
        *([f"objective.keep={options.keep}", f"data.unrelated={kept}"] if kept else []),
    )
    return called


class Judge:
    """Asks a backbone for its loss on texts, with any bricks plugged in.

    Args:
        options: the benchmark's.
        files: domain -> part -> file, see `texts`.
    """

    def __init__(self, options: argparse.Namespace, files: Mapping[str, Mapping[str, Path]]):
        from cfm_train.backbone.load import load_backbone
        from cfm_train.backbone.spec import resolve
        from cfm_train.library.store import Library

        self.options, self.files = options, files
        self.library = Library(f"{options.work}/library")
        self.backbone = load_backbone(resolve({"path": str(options.backbone)}), dtype="float32")
        self.texts = {
            (name, part): blocks(reader(self.backbone, parts[part]))
            for name, parts in files.items()
            for part in ("chosen", "judged")
        }

    def open(self, expression: str) -> Any:
        """A brick of the library, or a merge of some."""
        from cfm_train.configuration.apply import assemble
        from cfm_train.configuration.parser import parse

        return assemble(parse(expression), self.library, self.backbone)

    def nats(self, name: str, part: str, bricks: Sequence[Any]) -> np.ndarray:
        """Summed loss and number of tokens of each block of a domain's text ``[2, blocks]``."""
        return losses(self.backbone, self.texts[name, part], bricks)

    def mean(self, name: str, part: str, bricks: Sequence[Any]) -> float:
        """Nats per token."""
        total, count = self.nats(name, part, bricks).sum(axis=1)
        return float(total / count)


def reader(backbone: Any, document: Path) -> Reader:
    """What tokenises a text as a run on documents does."""
    from cfm_train.config.compose import compose
    from cfm_train.knowledge.documents import read
    from cfm_train.knowledge.tokens import Reader

    given = ["recipe=knowledge/lora", "name=a", "data.most_questions=24"]
    section = compose([*given, f"data.documents={document}"])["data"]
    return Reader(read(section), backbone.tokenizer, section["max_length"], section["context"])


def blocks(found: Reader) -> Any:
    """A text in packed blocks."""
    return found.blocks(found.documents.rows, [])


def losses(backbone: Any, encoded: Any, bricks: Sequence[Any]) -> np.ndarray:
    """Summed loss and number of tokens of each block ``[2, blocks]``."""
    import numpy as np

    from cfm_train.evaluation.evaluator import predict
    from cfm_train.knowledge.unrelated import SPEC

    with backbone.slots.plugged(bricks):
        found = predict(backbone, None, SPEC, encoded).losses
    return np.array([found[i] for i in range(len(encoded))], np.float64).T


def fine_tuned(
    options: argparse.Namespace,
    judge: Judge,
    name: str,
    rate: float,
    steps: int,
    part: str,
    *,
    rows: bool = False,
) -> Any:
    """Full fine-tuning on the blocks and batches of the brick; the loss on a text afterwards."""
    from cfm_train.backbone.load import load_backbone
    from cfm_train.backbone.spec import resolve
    from cfm_train.config.compose import option
    from cfm_train.data.encode import TaskData
    from cfm_train.knowledge.unrelated import SPEC
    from cfm_train.tracking.metrics_file import MetricsFile
    from cfm_train.tracking.wandb_run import WandbRun
    from cfm_train.training.checkpoint import read_position
    from cfm_train.training.fit import fit
    from cfm_train.training.whole_model import WholeModel

    backbone = load_backbone(resolve({"path": str(options.backbone)}), dtype="float32")
    learnt = blocks(reader(backbone, judge.files[name]["learnt"]))
    trainer = option("trainer", "default", learning_rate=rate)
    trainer |= {"max_steps": steps, "samples": 0, "tokens_per_batch": options.tokens}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fit(
            backbone,
            WholeModel().build(backbone),
            {SPEC.name: TaskData(SPEC, learnt, None, None)},
            trainer,
            seed=options.seed,
            mixture=1.0,
            folder=folder,
            position=read_position(folder / "checkpoints"),
            metrics=MetricsFile(folder / "metrics.jsonl"),
            wandb=WandbRun("disabled", "p", None, "train", [], {}, folder),
        )
    found = losses(backbone, judge.texts[name, part], [])
    return found if rows else found[0].sum() / found[1].sum()
