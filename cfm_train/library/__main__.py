"""``python -m cfm_train.library``: look at a library and look after it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfm_train.errors import UserError
from cfm_train.library.card import Card, check_name
from cfm_train.library.peft_checks import KINDS
from cfm_train.library.store import Library
from cfm_train.library.upkeep import GRACE, stitched_from

if TYPE_CHECKING:
    from cfm_train.backbone.spec import ResolvedBackbone

#: Commands that make the library where it is not there yet.
_MAKE = ("add", "pull")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; that of the process if None.

    Returns:
        The exit code: 0, or 2 after one sentence on standard error (the help, without a command).
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    problems: list[str] = []
    try:
        root = options.library or os.environ.get("CFM_LIBRARY") or "outputs/library"
        library = Library(root)
        if options.library and options.command not in _MAKE and not library.exists():
            raise UserError(f"There is no library {library.root}: correct --library.")
        problems = options.run(library, options) or []
        sys.stdout.flush()
    except UserError as error:
        problems = [str(error)]
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for sentence in problems:
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cfm_train.library", description=__doc__)
    parser.add_argument(
        "--library",
        metavar="DIR",
        help="folder or fsspec address (default: the variable CFM_LIBRARY, else outputs/library)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, ref: str | None = None) -> Any:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        if ref:
            optional = ref == "?"
            one.add_argument(
                "ref", metavar="REF", nargs="?" if optional else None, help="name or name@version"
            )
        return one

    one = command("ls", _ls, "list the bricks, newest version of each")
    one.add_argument("--json", action="store_true", help="as JSON")
    one = command("show", _show, "show everything about a brick", ref="1")
    one.add_argument("--json", action="store_true", help="the card itself")
    one = command("add", _add, "store a PEFT adapter folder, or what export wrote, as a brick")
    one.add_argument("folder", metavar="FOLDER", type=Path)
    one.add_argument("--name", required=True, help="the brick's name")
    one.add_argument("--backbone", help="a backbone's name, folder, Hub id or fingerprint")
    one.add_argument("--kind", choices=(*KINDS.values(), "peft"), help="insist on a kind")
    one.add_argument("--licence", help="SPDX identifier (default: that of its own model card)")
    command("verify", _verify, "hash everything again", ref="?")
    one = command("lineage", _lineage, "draw what a brick was made from", ref="1")
    one.add_argument("--json", action="store_true", help="as JSON")
    one = command("export", _export, "write a brick as a PEFT adapter folder", ref="1")
    one.add_argument("folder", metavar="FOLDER", type=Path)
    one = command("rm", _rm, "delete a version", ref="1")
    one.add_argument("--force", action="store_true", help="even if others were made from it")
    one = command("gc", _gc, "delete what killed runs left, and sidecars of what is gone")
    one.add_argument("--dry-run", action="store_true", help="only say what would go")
    one.add_argument("--grace", type=float, default=GRACE, help="seconds to leave things alone")
    one = command("push", _push, "copy a brick to a Hub repository or a folder", ref="1")
    one.add_argument("place", metavar="PLACE", help="ORGANISATION/NAME on the Hub, or a folder")
    one.add_argument("--private", action="store_true", help="make a new repository private")
    one = command("pull", _pull, "take a brick from a Hub repository or a folder")
    one.add_argument("place", metavar="PLACE", help="ORGANISATION/NAME on the Hub, or a folder")
    one.add_argument("--name", help="another name for it")
    one.add_argument("--revision", help="version, tag or commit on the Hub")
    return parser


def _ls(library: Library, options: argparse.Namespace) -> list[str]:
    from cfm_train.library.display import console, list_rows, list_table

    rows, problems = list_rows(library)
    if options.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        console().print(list_table(rows))
    elif not problems:
        print(f"No bricks yet in {library.root}.")
    return problems


def _show(library: Library, options: argparse.Namespace) -> None:
    from cfm_train.library.display import console, show_table

    card = library.find(options.ref)
    if options.json:
        print(card.to_json(), end="")
    else:
        console().print(show_table(library, card))


def _add(library: Library, options: argparse.Namespace) -> None:
    from cfm_train.library.peft_format import read_folder

    check_name(options.name)
    resolved, fingerprint, tokenizer = (
        _backbone(options.backbone) if options.backbone else (None, None, None)
    )
    why = _add_export(library, options, fingerprint)
    if why is None:
        return
    adapter = read_folder(options.folder, options.kind)
    if resolved:
        from cfm_train.backbone.fits import check_fits

        check_fits(adapter.tensors, resolved, str(options.folder))
    card = Card(
        name=options.name,
        kind=adapter.kind,
        granularity="layer",
        requires=[fingerprint] if fingerprint else [],
        backbone_id=resolved.id if resolved else adapter.base,
        tokenizer=tokenizer,
        operation="add",
        interface=adapter.interface,
        licence=options.licence or adapter.licence,
    )
    stored = library.add(adapter.files, card)
    print(f"{stored.ref}  {stored.kind}  {library.root}/{stored.name}/{stored.version}")
    if why:
        print(f"It comes as a foreign adapter, without heads and card: {why}")
    if not fingerprint:
        print("It names no backbone that can be checked: add it with --backbone to have that.")
    if adapter.aside:
        print(
            f"{len(adapter.aside)} tensors of whole modules ({adapter.aside[0]}, …) are kept for "
            "export and left out by cfm_train, which puts a head of its own on a backbone; where "
            "the backbone has such a module itself, the brick cannot be opened."
        )


def _add_export(
    library: Library, options: argparse.Namespace, fingerprint: str | None
) -> str | None:
    """Adds a folder that `export` wrote, with its heads and all that its card says.

    Returns:
        None where that was done; else why not (empty where the folder never was an export).
    """
    from cfm_train.library.folders import take_back

    try:
        found = take_back(options.folder)
    except UserError as error:
        return str(error)
    if found is None:
        return ""
    card, files = found
    if fingerprint and fingerprint not in card.requires[:1]:  # what follows is no backbone
        return f"{card.ref} was made for another backbone than --backbone."
    if options.kind not in (None, card.kind):
        return f"{card.ref} is of kind {card.kind}, and --kind asks for {options.kind}."
    licence = options.licence or card.licence
    stored = library.add(files, dataclasses.replace(card, name=options.name, licence=licence))
    print(f"{stored.ref}  {stored.kind}  {library.root}/{stored.name}/{stored.version}")
    heads = f"its heads ({', '.join(card.heads)}) and its card" if card.heads else "its card"
    print(f"The folder is {card.ref} as it was exported: {heads} came along.")
    return None


def _backbone(text: str) -> tuple[ResolvedBackbone | None, str, str | None]:
    """Folder, fingerprint and tokenizer hash of what a person calls a backbone."""
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return None, text, None
    import yaml

    from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash
    from cfm_train.backbone.spec import resolve
    from cfm_train.paths import ROOT

    section: dict[str, Any] = {"path": text}
    known = ROOT / "conf" / "backbone" / f"{text}.yaml"
    if re.fullmatch(r"[\w.-]+", text) and known.is_file() and not Path(text).is_dir():
        section = yaml.safe_load(known.read_text(encoding="utf-8"))
    resolved = resolve(section)
    return resolved, fingerprint(resolved.folder), tokenizer_hash(resolved.folder)


def _verify(library: Library, options: argparse.Namespace) -> list[str]:
    problems = library.verify(options.ref)
    if not problems:
        checked = 1 if options.ref else sum(1 for _ in library.cards())
        print(f"{checked} checked, all as it was written.")
    return [problem.sentence for problem in problems]


def _lineage(library: Library, options: argparse.Namespace) -> None:
    from cfm_train.library.display import console, lineage_tree

    node = library.lineage(options.ref)
    if options.json:
        print(json.dumps(node.to_dict(), indent=2))
    else:
        console().print(lineage_tree(node))


def _export(library: Library, options: argparse.Namespace) -> None:
    from cfm_train.library.folders import export

    for name in export(library, library.find(options.ref), options.folder):
        print(options.folder / name)


def _rm(library: Library, options: argparse.Namespace) -> None:
    lost = stitched_from(library, *library.locate(options.ref)) if options.force else []
    print(f"{library.remove(options.ref, force=options.force)} is deleted.")
    for ref in lost:
        print(f"warning: {ref} was stitched from it and can no longer be opened.", file=sys.stderr)


def _gc(library: Library, options: argparse.Namespace) -> None:
    gone = library.gc(dry_run=options.dry_run, grace=options.grace)
    for path in gone:
        print(path)
    print(f"{len(gone)} {'would go' if options.dry_run else 'deleted'}.")


def _push(library: Library, options: argparse.Namespace) -> None:
    from cfm_train.library import folders, hub

    card = library.find(options.ref)
    if hub.is_hub_id(options.place):
        print(hub.push_to_hub(library, card, options.place, private=options.private))
    else:
        folders.push(library, card, Path(options.place).expanduser())
        print(options.place)


def _pull(library: Library, options: argparse.Namespace) -> None:
    from cfm_train.library import folders, hub

    if options.name:
        check_name(options.name)
    if hub.is_hub_id(options.place):
        card = hub.pull_from_hub(
            library, options.place, revision=options.revision, name=options.name
        )
    else:
        card = folders.pull(library, Path(options.place).expanduser(), options.name)
    print(f"{card.ref}  {card.kind}  {library.root}/{card.name}/{card.version}")


if __name__ == "__main__":
    sys.exit(main())
