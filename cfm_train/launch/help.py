"""What ``--help`` prints: every recipe and option with its purpose, from the YAML files' heads.

No Hydra, no YAML parser, no torch: it answers in a fraction of a second.
"""

from __future__ import annotations

from cfm_train.config.catalogue import Entry, groups, recipes

_USAGE = """\
cfm_train: train, combine and compare bricks over a frozen foundation model

usage: python -m cfm_train recipe=<what>/<name> [key=value ...]
       python -m cfm_train -m recipe=<what>/<name> key=a,b,c ...     one run for every combination
       python -m cfm_train.library ls|show|add|verify|lineage|export|rm|gc|push|pull"""

_KEYS = {
    "name=TEXT": "the run's name, and that of the brick it makes",
    "seed=N": "seeds Python, NumPy, torch, the order of the data and dropout",
    "library=DIR": "where bricks are kept (outputs/library, or the variable CFM_LIBRARY)",
    "outputs=DIR": "where runs are kept (outputs)",
    "dry_run=true": "make every check, then stop",
    "<section>.<key>=…": "any key that --cfg job shows",
}

_FLAGS = {
    "-m, --multirun": "a,b,c, range(1,4) and glob(task/*) mean one run each; what is done is kept",
    "--cfg job": "print the composed run and stop (also: hydra, all)",
    "--info": "what Hydra found and where",
    "--hydra-help": "Hydra's own flags",
    "--shell-completion": "completion for bash, fish and zsh",
    "--version": "print the version",
}

_EXAMPLES = """\
  python -m cfm_train recipe=quickstart
  python -m cfm_train recipe=task/classify name=mine data.train=a.jsonl data.test=b.jsonl \\
      data.text=text data.label=label brick.rank=8
  python -m cfm_train recipe=task/classify backbone=hf backbone.path=FOLDER_OR_HUB_ID ...
  python -m cfm_train -m 'recipe=glob(task/*)' seed=1,2,3
  python -m cfm_train recipe=predict bricks=[mine] data.input=x.jsonl out=y.jsonl"""


def text() -> str:
    """The whole page."""
    parts = [_USAGE, "\nrecipes (recipe=…)"]
    for folder, entries in _by_folder(recipes()).items():
        if folder:
            parts.append(f"  {folder}/")
        parts += _table(
            {entry.name: _purpose(entry) for entry in entries}, indent=4 if folder else 2
        )
    for group, options in groups().items():
        parts.append(f"\n{group}=…")
        parts += _table({entry.name: _purpose(entry) for entry in options.values()})
    parts += ["\nkeys", *_table(_KEYS), "\nflags", *_table(_FLAGS), "\nexamples", _EXAMPLES]
    return "\n".join(parts)


def recipe_text(entry: Entry) -> str:
    """What one recipe is for and how it is started; its keys follow, as of ``--cfg job``."""
    needs = " ".join(f"{key}=…" for key in entry.needs)
    start = f"python -m cfm_train recipe={entry.name} {needs}".rstrip()
    return f"{entry.purpose}\n\n  {start}\n\nkeys, with the values that they have now:\n"


def _by_folder(entries: dict[str, Entry]) -> dict[str, list[Entry]]:
    folders: dict[str, list[Entry]] = {}
    for entry in sorted(entries.values(), key=lambda one: ("/" in one.name, one.name)):
        folders.setdefault(entry.name.rpartition("/")[0], []).append(entry)
    return folders


def _purpose(entry: Entry) -> str:
    return f"{entry.purpose} [needs {', '.join(entry.needs)}]" if entry.needs else entry.purpose


def _table(rows: dict[str, str], indent: int = 2) -> list[str]:
    width = max((len(left) for left in rows), default=0) + 2
    return [f"{'':{indent}}{left:{width}}{right}".rstrip() for left, right in rows.items()]
