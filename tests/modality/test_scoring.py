"""Classes scored behind a prompt that is computed once, against whole texts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cfm_train.bricks.kinds import make_brick
from cfm_train.modality.scoring import class_scores
from tests.backbones import randomise, tiny
from tests.peft_tuners import section


def test_classes_scored_with_a_shared_prefix_are_scored_as_whole_texts() -> None:
    backbone = tiny("llama")
    prompts, classes = [[5, 9, 7], [8, 6, 4]], [[10, 1], [11, 12, 1], [13, 14, 15, 1]]
    found = class_scores(backbone, prompts, classes, {}, "sum")
    for i, prompt in enumerate(prompts):
        for j, name in enumerate(classes):
            with torch.inference_mode():
                logits = backbone.logits(input_ids=torch.tensor([prompt + name])).double()
            told = logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            expected = sum(float(told[k, token]) for k, token in enumerate(name))
            assert found[i, j] == pytest.approx(expected, abs=1e-4)
    front = make_brick(section("soft_prompt")).build(backbone).eval()
    randomise(front)
    with backbone.slots.plugged([front]):
        led = class_scores(backbone, prompts, classes, {}, "sum")
        for i, j in itertools.product(range(2), range(3)):
            with torch.inference_mode():
                whole = torch.tensor([prompts[i] + classes[j]])
                logits = backbone.logits(input_ids=whole).double()
            told = logits[0].log_softmax(-1)[len(prompts[i]) - 1 : -1]
            expected = sum(float(told[k, token]) for k, token in enumerate(classes[j]))
            assert led[i, j] == pytest.approx(expected, abs=1e-4)
    assert np.abs(led - found).max() > 1e-3
    mean = class_scores(backbone, prompts, classes, {}, "mean")
    np.testing.assert_allclose(mean, found / [2, 3, 4])
