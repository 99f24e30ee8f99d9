"""A model that becomes a backbone: while it is pretrained, the whole of it is what is trained.

The trainer trains a brick on something that stands still. Here the brick is all there is, so that
pretraining has the same exact resume, metrics, divergence watch and progress bar.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from cfm_train.backbone.load import Backbone
from cfm_train.backbone.plugs import Plug
from cfm_train.bricks.brick import Brick


class WholeModel(Brick):
    """Every parameter of a model, trained in place; it plugs nothing in and is never stored."""

    trains_backbone = True

    def build(self, backbone: Backbone) -> Self:
        """Takes the model's own parameters, which must be float32."""
        self.model = backbone.model.requires_grad_(True)
        self.site_names = tuple(backbone.sites)
        return self

    def plugs(self) -> Iterable[Plug]:
        """Nothing."""
        return []
