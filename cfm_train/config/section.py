"""The base of every section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the config: every key named here must be there, and no other."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
