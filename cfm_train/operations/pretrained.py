"""What a pretraining says of the model that it wrote: every domain's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfm_train.data.corpora import Corpora

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cfm_train.backbone.load import Backbone


def judge(
    config: Mapping[str, Any], backbone: Backbone, corpora: Corpora
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Figures on each domain's held-out text, and the loss as cells of a matrix.

    Args:
        config: of the run.
        backbone: the model as it was written, loaded like any other.
        corpora: the domains; those left out are judged as well.

    Returns:
        ``test/<domain>/loss`` in nats per token, ``…/perplexity`` and ``…/bits_per_byte``,
        each with its interval over rows of ``data.max_length`` tokens; and the cells.
    """
    from cfm_train.data.encode import encode_rows
    from cfm_train.evaluation.evaluator import predict
    from cfm_train.paths import cache_dir

    figures: dict[str, dict[str, Any]] = {}
    cells = []
    for name, domain in corpora.domains.items():
        rows = domain.rows["validation"]
        encoded = encode_rows(rows, domain.spec, domain.section, backbone.tokenizer, cache_dir())
        answers = predict(backbone, None, domain.spec, encoded)
        scores = answers.scores(bootstrap=config["evaluation"]["bootstrap"], seed=config["seed"])
        found = {metric: score.as_dict() for metric, score in scores.items()}
        # Nats per token are of this tokenizer alone; bits per byte compare with any model.
        tokens = sum(count for _, count in answers.losses.values())
        size = sum(len(row["text"][0].encode()) for row in rows)
        scale = tokens / size / math.log(2)
        loss = found["loss"]
        found["bits_per_byte"] = {k: v if k == "n" else v * scale for k, v in loss.items()}
        figures |= {f"test/{name}/{metric}": one for metric, one in found.items()}
        cells.append(
            {"brick": config["name"], "task": name, "metric": "loss", **loss}
            | {"role": "brick", "head": None}
        )
        left = ", left out of training" if name in corpora.left_out else ""
        print(
            f"{name}: {loss['value']:.3f} nats per token, "
            f"{found['bits_per_byte']['value']:.3f} bits per byte{left}",
            flush=True,
        )
    return figures, cells


def same_weights(trained: nn.Module, written: nn.Module, dtype: torch.dtype) -> bool:
    """Whether what was read from the folder is what was trained, rounded once to a dtype."""
    import torch

    there = written.state_dict()
    return all(
        torch.equal(value.to(dtype).to(there[name].dtype), there[name])
        for name, value in trained.state_dict().items()
    )
