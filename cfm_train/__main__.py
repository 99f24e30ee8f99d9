"""``python -m cfm_train recipe=<what>/<name> key=value …``: compose, validate, hand over."""

from __future__ import annotations

import sys

from cfm_train.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
