"""Reads the few flags of the command line; everything else on it is an override."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cfm_train.errors import UserError, nearest

_SHORT = {
    "-h": "--help",
    "-m": "--multirun",
    "-c": "--cfg",
    "-i": "--info",
    "-sc": "--shell-completion",
}
_PLAIN = {"--help", "--multirun", "--version", "--hydra-help", "--shell-completion", "--resolve"}
_VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}


@dataclass
class Command:
    """What was asked for.

    Attributes:
        flags: the long names of the flags given, with their value or None.
        overrides: the rest, in order.
    """

    flags: dict[str, str | None] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def parse(arguments: Sequence[str]) -> Command:
    """Splits flags from overrides, wherever the flags stand.

    Raises:
        UserError: an unknown flag, or a value that the flag does not take.
    """
    command, rest = Command(), list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        name = _SHORT.get(name, name)
        if not name.startswith("-"):
            command.overrides.append(argument)
        elif name in _PLAIN and not equals:
            command.flags[name] = None
        elif name in _VALUES:
            if not equals and rest and rest[0] in _VALUES[name]:
                value = rest.pop(0)
            value = value or ("all" if name == "--info" else "")
            if value not in _VALUES[name]:
                raise UserError(f"{name} takes one of {', '.join(_VALUES[name])}.")
            command.flags[name] = value
        else:
            raise UserError(f"There is no flag '{argument}'.{nearest(name, {*_PLAIN, *_VALUES})}")
    return command
