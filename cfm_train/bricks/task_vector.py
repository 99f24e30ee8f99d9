"""Task vectors: what demonstrations leave in a model, put there without them.

At one layer, on the last token of a prompt q, behind demonstrations d:

    θ = mean over contexts of  h(d_1 … d_n q)               what the model has made of the task
    replace   h ← θ                                          Hendel et al. 2023, arXiv 2310.15916
    add       h ← h + strength · (θ − mean of h(q))          as function vectors are added,
                                                             Todd et al. 2023, arXiv 2310.15213

Nothing is trained. Every layer is tried, and the one with the lowest loss on the answers of
validation rows is kept. The vector acts wherever a prompt that was given ends, not on what the
model goes on to write. Only a language model that reads from left to right can be shown
demonstrations, so the kind needs a decoder and a task of prompts and answers (``instruct``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from safetensors.torch import load
from torch import Tensor, nn

from cfm_train.backbone.plugs import Call, Out
from cfm_train.bricks.brick import NATIVE_FILE, Brick, Derived, parameter_name
from cfm_train.bricks.demonstrations import (
    Context,
    answer_loss,
    common_ending,
    draw_contexts,
    ends_here,
    examples,
)
from cfm_train.config.types import Positive
from cfm_train.errors import UserError

if TYPE_CHECKING:
    from cfm_train.backbone.load import Backbone
    from cfm_train.data.encode import TaskData


class TaskVector(Brick):
    """One vector at the output of one layer, where a prompt ends.

    Args:
        demonstrations: rows with answers in each context.
        contexts: how many contexts the vector is the mean of.
        mode: ``add`` the difference that demonstrations make, or ``replace`` what is there.
        strength: factor on what is added (below zero it leads away from the task); without effect
            on ``replace``.
        layers: numbers of the layers to try, negative ones from the top; None for all.
        validation_rows: at most so many rows decide between the layers.
    """

    trains: ClassVar[bool] = False

    def __init__(
        self,
        demonstrations: Positive,
        contexts: Positive,
        mode: Literal["add", "replace"],
        strength: float,
        layers: list[int] | None,
        validation_rows: Positive,
    ) -> None:
        super().__init__(
            demonstrations=demonstrations,
            contexts=contexts,
            mode=mode,
            strength=strength,
            layers=layers,
            validation_rows=validation_rows,
        )
        self.vectors = nn.ParameterDict()
        self.ending: Tensor
        # Among the tensors, so that vectors for other prompts are never taken for the same brick.
        self.register_buffer("ending", torch.empty(0, dtype=torch.int64))

    def build(self, backbone: Backbone) -> Self:
        """Checks that the backbone can be shown demonstrations; there is no vector yet.

        Raises:
            UserError: it is no decoder with a language model head.
        """
        if backbone.family != "decoder" or backbone.model.get_output_embeddings() is None:
            raise UserError(
                "A task vector is what demonstrations leave in a language model that reads from "
                f"left to right, and the backbone '{backbone.id}' is none ({backbone.family}): "
                "choose lora, or head for the frozen backbone's own features."
            )
        return self

    def hold(self, site: str, vector: Tensor, ending: Sequence[int]) -> Self:
        """Takes a vector ``[hidden]`` for a layer, and the ending of the prompts it acts on."""
        self.site_names = (site,)
        self.ending = torch.tensor(ending, dtype=torch.int64, device=vector.device)
        self.vectors = nn.ParameterDict(
            {parameter_name(site): nn.Parameter(vector.float(), requires_grad=False)}
        )
        return self

    def plugs(self) -> Iterable[Out]:
        """The vector at its layer; nothing while there is none."""
        for site in self.site_names:
            vector = self.vectors[parameter_name(site)]
            yield Out(site, functools.partial(self._act, vector), reads="embed")

    def _act(self, vector: Tensor, call: Call) -> Tensor:
        """The layer's output with the vector wherever a prompt ends."""
        assert call.y is not None
        ids = call.captured.get("embed")
        if ids is None or ids.shape[0] != call.y.shape[0]:
            raise UserError(
                "A task vector finds the end of a prompt by its token ids: give the model "
                "input_ids, not embeddings."
            )
        there = nn.functional.pad(ends_here(ids, self.ending), (call.y.shape[1] - ids.shape[1], 0))
        vector = vector.to(call.y.device, call.y.dtype)
        new = call.y + vector if self.hyper["mode"] == "add" else vector
        return torch.where(there[..., None], new, call.y)

    def fit_without_training(
        self, backbone: Backbone, tasks: Mapping[str, TaskData], seed: int
    ) -> Derived:
        """Reads demonstrations, and keeps the layer whose vector helps validation rows most.

        Where a task has no validation split, training rows are held out for it.

        Raises:
            UserError: several tasks, one without prompts and answers, prompts without a common
                ending, or too few rows.
        """
        task = _only_task(tasks)
        rows = examples(task.train)
        if task.validation is not None:
            held = examples(task.validation)
        else:
            held, rows = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        held = held[: self.hyper["validation_rows"]]
        ending = common_ending([*rows, *held]) if rows and held else ()
        if not ending:
            raise UserError(
                f"The prompts of '{task.spec.name}' do not end alike (or there are too few rows), "
                "so a task vector would not know where to act: give rows with prompt and answer, "
                "and a chat template or a last word that they share."
            )
        hyper = self.hyper
        contexts = draw_contexts(rows, hyper["demonstrations"], hyper["contexts"], backbone, seed)
        layers = [site.name for site in backbone.sites.select(["layer"], hyper["layers"])]
        vectors = self._vectors(backbone, contexts, layers)
        asked = [(row.prompt, row.answer) for row in held]
        with backbone.slots.plugged([]):
            scores = {"without": answer_loss(backbone, asked)}
        for layer in layers:
            with backbone.slots.plugged([self.hold(layer, vectors[layer], ending)]):
                scores[layer] = answer_loss(backbone, asked)
        best = min(layers, key=scores.__getitem__)
        self.hold(best, vectors[best], ending).to(backbone.device)
        alone = self.hyper["mode"] == "add"
        tokens = sum(len(c.shown) + (len(c.alone) if alone else 0) for c in contexts)
        return Derived(len(contexts) * (hyper["demonstrations"] + 1), tokens, scores)

    def _vectors(
        self, backbone: Backbone, contexts: list[Context], layers: list[str]
    ) -> dict[str, Tensor]:
        """The vector of each layer, ``[hidden]`` float32."""
        shown = _last_states(backbone, [c.shown for c in contexts], layers)
        if self.hyper["mode"] == "replace":
            return shown
        alone = _last_states(backbone, [c.alone for c in contexts], layers)
        return {layer: self.hyper["strength"] * (shown[layer] - alone[layer]) for layer in layers}

    @classmethod
    def restore(
        cls, interface: Mapping[str, Any], files: Mapping[str, bytes], backbone: Backbone
    ) -> Self:
        """A brick from its file; an empty one where no vector had been made."""
        brick = cls(**interface["hyper"]).build(backbone)
        tensors = load(files[NATIVE_FILE])
        for site in interface["sites"]:
            ending = tensors.get("ending", brick.ending).tolist()
            brick.hold(site, torch.zeros(backbone.sites[site].out_features), ending)
        brick.load_tensors(tensors)
        return brick.to(backbone.device)


def _only_task(tasks: Mapping[str, TaskData]) -> TaskData:
    task = next(iter(tasks.values()))
    if len(tasks) > 1 or task.spec.type != "instruct":
        what = f"{len(tasks)} tasks" if len(tasks) > 1 else f"a task of type {task.spec.type}"
        raise UserError(
            "A task vector is made from the prompts and answers of one task (data.task=instruct), "
            f"but this run has {what}: choose lora for it, or give the answers as text."
        )
    return task


class _Listener:
    """Notes each layer's output on the last token, and changes nothing."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.noted: dict[str, Tensor] = {}

    def plugs(self) -> Iterable[Out]:
        for layer in self.layers:
            yield Out(layer, functools.partial(self._note, layer))

    def _note(self, layer: str, call: Call) -> Tensor:
        assert call.y is not None
        self.noted[layer] = call.y[0, -1].detach().float()
        return call.y


@torch.no_grad()
def _last_states(
    backbone: Backbone, texts: list[list[int]], layers: list[str]
) -> dict[str, Tensor]:
    """The mean of each layer's output on the last token of some texts, ``[hidden]`` float32."""
    listener = _Listener(layers)
    sums: dict[str, Tensor] = {}
    with backbone.slots.plugged([listener]):
        for ids in texts:
            backbone.hidden_states(torch.tensor([ids], device=backbone.device))
            for layer, state in listener.noted.items():
                sums[layer] = state + sums[layer] if layer in sums else state
    return {layer: total / len(texts) for layer, total in sums.items()}
