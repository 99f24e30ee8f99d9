"""Text domains: a file to train on and one to validate on for each, some of them left out.

<root>/<domain>.train.txt, <root>/<domain>.valid.txt ─► all that is trained on, as one task
                                                    └─► each domain, to be judged alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfm_train.data.sources import Checked, check, fingerprint
from cfm_train.data.splits import EXAMPLES, make_disjoint
from cfm_train.errors import UserError, nearest

TRAIN, VALIDATION = ".train.txt", ".valid.txt"


@dataclass(frozen=True)
class Corpora:
    """Domains that have been read.

    Attributes:
        text: all domains that are trained on: their training and validation rows.
        domains: every domain by name, those left out too; its validation rows are to be judged.
        left_out: the domains that nothing is trained on.
    """

    text: Checked
    domains: dict[str, Checked]
    left_out: list[str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """``data/<split>`` of what is trained on, ``data/<domain>`` of what is judged."""
        return {f"data/{split}": value for split, value in self.text.fingerprints.items()} | {
            f"data/{name}": one.fingerprints["validation"] for name, one in self.domains.items()
        }


def read(section: Mapping[str, Any]) -> Corpora:
    """Reads the domains of a section ``data`` of `config.sections.Corpora`.

    A document that stands in any domain's validation file is left out of training, also where that
    domain is judged alone.

    Raises:
        UserError: there is no such folder or domain, a file is missing or empty, or nothing is left
            to train on.
    """
    from cfm_train.config.compose import option

    root = Path(section["root"]).expanduser()
    names = _chosen(root, section)
    checked = {
        name: check(
            option(
                "data",
                "custom",
                name=name,
                task="causal",
                train=str(root / f"{name}{TRAIN}"),
                validation=str(root / f"{name}{VALIDATION}"),
                text="text",
                unit=section["unit"],
                max_length=section["max_length"],
            )
        )
        for name in names
    }
    left_out = [name for name in names if name in section["leave_out"]]
    trained = [name for name in names if name not in left_out]
    held = [row for name in names for row in checked[name].rows["validation"]]
    rows, leaks = make_disjoint(
        {
            "train": [row for name in trained for row in checked[name].rows["train"]],
            "validation": held,
        }
    )
    if not rows["train"]:
        raise UserError("data: every training document stands in a validation file too.")
    for one in (checked[name].leaks for name in trained):  # what each domain's own files share
        for pair, count in one.counts.items():
            leaks.counts[pair] = leaks.counts.get(pair, 0) + count
        leaks.examples.extend(one.examples[: EXAMPLES - len(leaks.examples)])
    rows["validation"] = [row for name in trained for row in checked[name].rows["validation"]]
    first = checked[trained[0]]
    text = Checked(
        spec=replace(first.spec, name="text"),
        section={**first.section, "name": "text"},
        rows=rows,
        fingerprints={split: fingerprint(some) for split, some in rows.items() if some},
        skipped={},
        reasons=[],
        leaks=leaks,
    )
    return Corpora(text, checked, left_out)


def _chosen(root: Path, section: Mapping[str, Any]) -> list[str]:
    """The names of the domains, those left out among them."""
    if not root.is_dir():
        raise UserError(f"data.root: there is no folder {root}.")
    there = sorted(path.name.removesuffix(TRAIN) for path in root.glob(f"*{TRAIN}"))
    if not there:
        raise UserError(
            f"data.root: {root} holds no text domain: each is a pair of files, DOMAIN{TRAIN} and "
            f"DOMAIN{VALIDATION}."
        )
    names = there if section["domains"] is None else list(section["domains"])
    for key, given in (("domains", names), ("leave_out", section["leave_out"])):
        for name in given:
            if name not in there:
                raise UserError(f"data.{key}: {root} has no domain '{name}'.{nearest(name, there)}")
            if list(given).count(name) > 1:
                raise UserError(f"data.{key}: '{name}' is listed twice; name each domain once.")
    names += [name for name in section["leave_out"] if name not in names]
    if set(names) == set(section["leave_out"]):
        raise UserError("data.leave_out leaves no domain to train on: name fewer.")
    return names
