"""A frozen backbone with a brick's head on top, as transformers' own tools expect it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from cfm_train.backbone.load import Backbone
from cfm_train.bricks.heads import Head
from cfm_train.data.tasks import IGNORED

#: Our task types as transformers' ``problem_type``.
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


class HeadedModel(PreTrainedModel):
    """A backbone, whatever is plugged into it, and a head; usable with transformers' pipelines.

    Args:
        config: the backbone's config with the head's labels.
        backbone: the frozen backbone.
        head: the head.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True  # the body brings its own attention function

    def __init__(self, config: PretrainedConfig, backbone: Backbone, head: Head) -> None:
        super().__init__(config)
        self.body = backbone.model
        self.head = head
        self._plugged: list[Backbone] = [backbone]  # in a list: no submodule, `body` is its model
        takes = inspect.signature(backbone.model.base_model.forward).parameters
        self._counts_positions = backbone.family == "decoder" and "position_ids" in takes

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Logits of the head, ``[batch, labels]`` (tagging: ``[batch, seq, labels]``), float32.

        Args:
            input_ids: ``[batch, seq]`` int64.
            attention_mask: ``[batch, seq]``, all ones if not given.
            token_type_ids: ``[batch, seq]``, for backbones that take them.
            labels: targets by task type; gives ``loss``, the mean.
            **kwargs: not used by a head (``return_dict``, …).
        """
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self._counts_positions and not bool(mask[:, 0].all()):
            # Padding on the left must not move the text away from position 0.
            extra["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        logits = self.head(self._plugged[0].hidden_states(input_ids, mask, **extra), mask)
        loss = None if labels is None else _loss(self.head.task_type, logits, labels)
        if self.head.task_type == "token":
            return TokenClassifierOutput(loss=loss, logits=logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _loss(task_type: str, logits: Tensor, labels: Tensor) -> Tensor:
    if task_type == "regression":
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    if task_type == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED
    )


def headed_model(backbone: Backbone, head: Head) -> HeadedModel:
    """The backbone with a head, in eval mode.

    Args:
        backbone: the backbone, with bricks plugged in or not.
        head: a head that was trained on it.
    """
    config = copy.deepcopy(backbone.model.config)
    names = head.labels or ["value"]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.num_labels = len(names)
    config.problem_type = PROBLEM_TYPES.get(head.task_type)
    names_of = (
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
        if head.task_type == "token"
        else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    )
    # Pipelines know what a model can do by the name of its class.
    known = names_of.get(config.model_type, HeadedModel.__name__)
    own: type[HeadedModel] = type(known, (HeadedModel,), {"__doc__": HeadedModel.__doc__})
    return own(config, backbone, head).eval()
