"""How the values of `benchmarks/merge.py` are apart: ours, mergekit-yaml's, mergekit in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.merge_inputs import WEIGHTS


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """How two merged models differ: share of bfloat16 outputs, and relative norm."""
    import torch
    from safetensors import safe_open

    count = different = 0
    square = whole = 0.0
    with (
        safe_open(ours / "model.safetensors", "pt") as a,
        safe_open(next(theirs.glob("*.safetensors")), "pt") as b,
    ):
        for name in a.keys():  # noqa: SIM118 (an open file is no mapping)
            x, y = a.get_tensor(name), b.get_tensor(name)
            count += x.numel()
            different += int((x != y).sum())
            square += float((x.float() - y.float()).square().sum(dtype=torch.float64))
            whole += float(y.float().square().sum(dtype=torch.float64))
    return {"outputs": different / count, "norm": (square / whole) ** 0.5}


def in_memory(folder: Path) -> dict[str, float]:
    """TIES against mergekit's function in float32, on two matrices.

    Returns:
        Share of bfloat16 outputs that differ from ours; share of those at which no model's update
        is as large as its threshold, where both must agree; share that mergekit-yaml's own differ.
    """
    import torch
    from mergekit.merge_methods.api import merge_tensors
    from safetensors import safe_open

    def read(model: Path, name: str) -> Any:
        with safe_open(next(model.glob("*.safetensors")), "pt") as opened:
            return opened.get_tensor(name)

    ids = ["base", "m1", "m2", "m3"]
    count = different = elsewhere = theirs_different = 0
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        used = [read(folder / model, name).float() for model in ids]
        theirs = merge_tensors(
            [one.clone() for one in used],
            "ties",
            parameters={
                "weight": dict(zip(ids[1:], WEIGHTS, strict=True)),
                "density": 0.2,
                "normalize": True,
            },
            ids=ids,
            base_index=0,
        ).bfloat16()
        at_threshold = torch.zeros(theirs.shape, dtype=torch.bool)
        for one in used[1:]:
            update = (one - used[0]).abs()
            at_threshold |= update == update.flatten().topk(int(0.2 * update.numel())).values[-1]
        apart = read(folder / "ours-ties", name) != theirs
        count += theirs.numel()
        different += int(apart.sum())
        elsewhere += int((apart & ~at_threshold).sum())
        theirs_different += int((read(folder / "mergekit-ties", name) != theirs).sum())
    return {
        "outputs unlike float32 mergekit": different / count,
        "of them not at a threshold": elsewhere / count,
        "mergekit-yaml unlike float32 mergekit": theirs_different / count,
    }
