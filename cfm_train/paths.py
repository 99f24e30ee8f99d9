"""Where the project finds its own files and where it may keep things between runs."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

#: The folder that holds ``conf/`` and ``recipes/``: the package in a wheel, else the checkout.
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent


def cache_dir() -> Path:
    """Where things that can be made again are kept: ``$CFM_CACHE`` or ``~/.cache/cfm_train``."""
    return Path(os.environ.get("CFM_CACHE") or Path.home() / ".cache" / "cfm_train")
