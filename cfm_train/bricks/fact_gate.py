"""The gate of a brick of facts: which fact a prompt asks for, if any.

A fact may be asked for where its subject stands in the prompt, as whole words. Whether it is asked
for (and not something else about the subject) is told by a frozen sentence encoder: the prompt with
the subject taken out is compared with the prompts that were taught, theirs taken out too,

    fires(fact)   subject in prompt  and  max_p cos(E(prompt - subject), E(taught_p - subject)) ≥ t

and of several facts that fire the nearest acts. With the subject left in, the encoder sees above
all that two prompts are about the same thing. t is calibrated on what was taught (`calibrate`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cfm_train.data.facts import mentions, normalised
from cfm_train.errors import UserError

#: What stands for the subject where the encoder has no mask of its own.
BLANK = "it"
#: Most tokens of a prompt that the encoder reads, from its end.
TOKENS = 256
#: Prompts that are encoded together.
ROWS = 64


class Encoder:
    """A frozen sentence encoder: the mean of the last hidden states, at unit length.

    Args:
        section: its ``backbone`` section.
        fingerprint: of its files, None to take it as it is found.

    Raises:
        UserError: it cannot be found, is another one than it was, or is no encoder.
    """

    def __init__(self, section: Mapping[str, Any], fingerprint: str | None = None) -> None:
        from cfm_train.backbone.load import load_backbone
        from cfm_train.backbone.spec import resolve

        self.section = dict(section)
        self.model = load_backbone(resolve(section, "sentence_encoder"), dtype="float32")
        if self.model.family != "encoder":
            raise UserError(
                f"sentence_encoder: '{self.model.id}' is a language model ({self.model.family}), "
                "no encoder: use backbone@sentence_encoder=minilm."
            )
        if fingerprint is not None and self.model.fingerprint != fingerprint:
            raise UserError(
                f"The brick's gate was made with another '{self.model.id}' (fingerprint "
                f"{fingerprint[:12]}, here {self.model.fingerprint[:12]}): install that one."
            )
        self._kept: dict[str, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        """Of its files."""
        return self.model.fingerprint

    @property
    def blank(self) -> str:
        """What stands for a subject."""
        return str(self.model.tokenizer.mask_token or BLANK)

    def encode(self, texts: Sequence[str], tick: Callable[[int], Any] | None = None) -> Tensor:
        """Vectors ``[texts, width]`` float32 at unit length; each text is read once in a process.

        Args:
            texts: what to encode.
            tick: told how many texts have just been read.
        """
        new = sorted({text for text in texts if text not in self._kept}, key=len)
        tokenizer = self.model.tokenizer
        tokenizer.truncation_side = "left"
        for start in range(0, len(new), ROWS):
            part = new[start : start + ROWS]
            batch = tokenizer(
                part, return_tensors="pt", padding=True, truncation=True, max_length=TOKENS
            )
            mask = batch["attention_mask"]
            with torch.inference_mode():
                hidden = self.model.hidden_states(batch["input_ids"], mask).float()
                weight = mask[..., None].float()
                mean = (hidden * weight).sum(1) / weight.sum(1)
                unit = torch.nn.functional.normalize(mean, dim=-1)
            self._kept |= dict(zip(part, unit.clone(), strict=True))
            if tick is not None:
                tick(len(part))
        return torch.stack([self._kept[text] for text in texts])


class FactGate:
    """Finds the fact that a prompt asks for.

    Args:
        facts: the facts in the brick's order.
        vectors: ``[prompts, width]`` float32, those of all taught prompts, fact after fact.
        owner: ``[prompts]`` int64, the fact of each.
        threshold: the least cosine at which a fact fires, a scalar.
        section: the encoder's ``backbone`` section.
        fingerprint: of the encoder.
        encoder: the encoder where it is loaded already; loaded at the first prompt else.
    """

    def __init__(
        self,
        facts: Sequence[Mapping[str, Any]],
        vectors: Tensor,
        owner: Tensor,
        threshold: Tensor,
        section: Mapping[str, Any],
        fingerprint: str,
        encoder: Encoder | None = None,
    ) -> None:
        self.facts = list(facts)
        self.vectors, self.owner, self.threshold = vectors, owner, threshold
        self.section, self.fingerprint = dict(section), fingerprint
        self._encoder = encoder
        self._named: dict[str, list[int]] = {}
        for at, fact in enumerate(self.facts):
            self._named.setdefault(normalised(fact["subject"]), []).append(at)

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded when it is needed."""
        if self._encoder is None:
            self._encoder = Encoder(self.section, self.fingerprint)
        return self._encoder

    def tensors(self) -> dict[str, Tensor]:
        """What is stored beside the facts' own parameters."""
        return {
            "vectors": self.vectors.contiguous(),
            "owner": self.owner.contiguous(),
            "threshold": self.threshold.contiguous(),
        }

    def described(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {"encoder": self.section, "fingerprint": self.fingerprint}

    def only(self, kept: Sequence[int]) -> FactGate:
        """The gate of some of the facts, with the threshold that it has."""
        rows = torch.cat([(self.owner == at).nonzero()[:, 0] for at in kept])
        owner = torch.cat(
            [torch.full((int((self.owner == a).sum()),), i) for i, a in enumerate(kept)]
        )
        return FactGate(
            [self.facts[at] for at in kept],
            self.vectors[rows],
            owner,
            self.threshold,
            self.section,
            self.fingerprint,
            self._encoder,
        )

    def with_more(self, facts: Sequence[Mapping[str, Any]], encoder: Encoder) -> FactGate:
        """The gate of more facts, as `Fact.taught` gives them, with the threshold that it has."""
        cuts = [
            [without(text, fact["subject"], encoder.blank) for text in prompts_of(fact)]
            for fact in facts
        ]
        first = len(self.facts)
        owner = [first + at for at, one in enumerate(cuts) for _ in one]
        return FactGate(
            [*self.facts, *facts],
            torch.cat([self.vectors, encoder.encode([cut for one in cuts for cut in one])]),
            torch.cat([self.owner, torch.tensor(owner, dtype=torch.int64)]),
            self.threshold,
            self.section,
            self.fingerprint,
            encoder,
        )

    def find(self, prompts: Sequence[str]) -> list[int]:
        """The fact that each prompt asks for, -1 for none.

        Prompts that name no subject cost nothing; the others are encoded once.
        """
        pairs = [(i, at, cut) for i, one in enumerate(prompts) for at, cut in self._named_in(one)]
        if not pairs:
            return [-1] * len(prompts)
        vectors = self.encoder.encode([cut for _, _, cut in pairs])
        best: dict[int, tuple[float, int]] = {}
        for (i, at, _), vector in zip(pairs, vectors, strict=True):
            near = float((self.vectors[self.owner == at] @ vector).max())
            if near >= float(self.threshold) and near > best.get(i, (-2.0, 0))[0]:
                best[i] = near, at
        return [best[i][1] if i in best else -1 for i in range(len(prompts))]

    def _named_in(self, prompt: str) -> list[tuple[int, str]]:
        """Facts whose subject the prompt names, and the prompt without it."""
        text = normalised(prompt)
        return [
            (at, without(prompt, subject, self.encoder.blank))
            for subject, facts in self._named.items()
            if subject in text and mentions(text, subject)
            for at in facts
        ]


def prompts_of(fact: Mapping[str, Any]) -> list[str]:
    """The prompts that a fact was taught with, each once."""
    return list(dict.fromkeys((fact["prompt"], *fact["paraphrases"])))


def without(prompt: str, subject: str, blank: str) -> str:
    """A prompt with a blank for its subject, and only its last sentence part that names it.

    What stands in front of the sentence (another sentence) says nothing of what is asked.
    """
    text = normalised(prompt)
    hits = list(re.finditer(rf"(?<!\w){re.escape(normalised(subject))}(?!\w)", text))
    if not hits:
        return text
    start = max((m.end() for m in re.finditer(r"[.!?]\s", text[: hits[-1].start()])), default=0)
    head, tail = text[start : hits[-1].start()], text[hits[-1].end() :]
    return f"{head}{blank}{tail}"


def read_gate(
    described: Mapping[str, Any], facts: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> FactGate:
    """A gate from what `FactGate.described` and `FactGate.tensors` gave."""
    if set(tensors) != {"vectors", "owner", "threshold"}:
        raise UserError("The gate of the brick lacks a tensor: teach the facts again.")
    return FactGate(
        facts,
        tensors["vectors"],
        tensors["owner"],
        tensors["threshold"],
        described["encoder"],
        described["fingerprint"],
    )
