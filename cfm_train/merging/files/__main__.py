"""``python -m cfm_train.merging.files``: merge PEFT adapter folders into one.

python -m cfm_train.merging.files IN1 IN2 --rule ties/mergekit --density 0.3 --out DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfm_train.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges.

    Args:
        arguments: the command line without the program's name; that of the process if None.

    Returns:
        The exit code: 0, or 2 after one sentence on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        _merge(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cfm_train.merging.files",
        description="Merge PEFT LoRA adapter folders into one, without their backbone.",
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument("--rule", default="linear", help="such as ties/mergekit (default: linear)")
    parser.add_argument("--weights", metavar="LIST", help="one for each adapter: 0.3,0.7")
    parser.add_argument("--space", help="delta, cat, core, knots, parameters (default: the rule's)")
    parser.add_argument("--rank", type=int, help="of the merged adapter (default: all ranks added)")
    parser.add_argument("--density", type=float, help="share that the rule's sparsifier keeps")
    parser.add_argument("--base", metavar="NAME", help="what the adapters' backbone is called")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any parameter of a merge"
    )
    return parser


def _merge(options: argparse.Namespace) -> None:
    from cfm_train.merging.files.adapters import open_adapters
    from cfm_train.merging.files.merge import check_out, merge_adapters, parameters_of
    from cfm_train.merging.weights import check_weights

    given = _given(options)
    parameters_of(options.rule, given)
    weights = None
    if options.weights is not None:
        weights = _value("--weights", f"[{options.weights.strip()}]")
        if len(weights) == 1 and isinstance(weights[0], list):  # brackets were typed
            weights = weights[0]
        check_weights(weights, len(options.folders), "--weights")
    adapters = open_adapters(options.folders, options.base)
    check_out(options.out, options.folders)
    merged = merge_adapters(adapters, weights, options.rule, given)
    merged.write(options.out)
    lost = "" if merged.lost is None else f", up to {merged.lost:.1%} of an update (norm) left out"
    print(f"{options.out}: rank {merged.rank}{lost}")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--set {text}: write --set KEY=VALUE.")
        given[key] = _value(f"--set {key}", value)
    for key in ("space", "rank", "density"):
        if getattr(options, key) is not None:
            given[key] = getattr(options, key)
    return given


def _value(what: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"{what}: '{text}' cannot be read: write numbers, words or lists."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
