"""Muon's step by value, what it is given, and a run that goes on where it was killed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfm_train.training.muon import ADAMW_SIZE, MOMENTUM, Muon, hidden_matrices, nearly_orthogonal


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = nearly_orthogonal(matrix)
    U, S, V = torch.linalg.svd(found, full_matrices=False)
    assert 0.3 < S.min() and S.max() < 1.3
    # U V' of the matrix itself, each direction scaled: what the iteration may do and no more.
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ v.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-9, rtol=0)


def test_matrices_in_a_stack_are_what_they_are_alone() -> None:
    stack = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = torch.stack([nearly_orthogonal(matrix) for matrix in stack])
    torch.testing.assert_close(nearly_orthogonal(stack), alone, atol=1e-12, rtol=0)


def test_a_step_is_torch_muons_where_that_iterates_in_bfloat16() -> None:
    start = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    gradients = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(3))
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([{"params": [ours], "lr": 0.02, "muon": True}], weight_decay=0.1)
    peer = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    for gradient in gradients:
        for parameter, optimizer in ((ours, mine), (theirs, peer)):
            parameter.grad = gradient.clone()
            optimizer.step()
    # 0.02 of one step's size: bfloat16 carries eight bits.
    size = 0.02 * ADAMW_SIZE * 24**0.5
    assert (ours - theirs).abs().max() < 0.05 * size
    assert (ours - start).abs().max() > 0.2 * size


def test_what_is_no_hidden_matrix_takes_adamws_very_step() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(7, 4), "inner": nn.Linear(4, 4)})
    names = hidden_matrices(model)
    assert names == {"inner.weight"}
    twin = nn.ModuleDict({"table": nn.Embedding(7, 4), "inner": nn.Linear(4, 4)})
    twin.load_state_dict(model.state_dict())

    def rest(module: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in module.named_parameters() if name not in names]

    hidden = [{"params": [model["inner"].weight], "lr": 0.1, "muon": True}]
    optimizer = Muon([{"params": rest(model), "lr": 0.1}, *hidden], weight_decay=0.01)
    plain = torch.optim.AdamW(rest(twin), lr=0.1, weight_decay=0.01)
    for module, one in ((model, optimizer), (twin, plain)):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        one.step()
    for a, b in zip(rest(model), rest(twin), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model["inner"].weight, twin["inner"].weight)


def test_its_state_goes_through_a_state_dict() -> None:
    def run(steps: list[torch.Tensor], parts: int) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(4, 6))
        optimizer = Muon([{"params": [parameter], "lr": 0.1, "muon": True}], weight_decay=0.0)
        for i, gradient in enumerate(steps):
            if i == parts:
                kept = optimizer.state_dict()
                groups = [{"params": [parameter], "lr": 0.1, "muon": True}]
                optimizer = Muon(groups, weight_decay=0.0)
                optimizer.load_state_dict(kept)
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach()

    generator = torch.Generator().manual_seed(4)
    gradients = [torch.randn(4, 6, generator=generator) for _ in range(4)]
    assert torch.equal(run(gradients, 2), run(gradients, -1))


def test_the_output_table_is_no_hidden_matrix() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=11,
        tie_word_embeddings=False,
    )
    names = hidden_matrices(transformers.LlamaForCausalLM(config))
    assert "lm_head.weight" not in names
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("embed" in name for name in names)
