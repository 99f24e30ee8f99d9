"""Tiny random backbones of four families, as real folders on disk: what the bricks' tests run on.

    backbone = tiny("llama")                    loaded like any other backbone, slots empty
    logits = answers(backbone, batch(backbone)) logits, or hidden states where there is no LM head

Biases and norm weights are random too, so that nothing is right by being zero or one.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfm_train.backbone.load import Backbone, load_backbone
from cfm_train.backbone.spec import resolve

FAMILIES = ("bert", "llama", "gpt2", "t5")
#: Not in every test: q, k and v interleaved by head; fused gate and up, norms without a bias.
FUSED = ("gpt_neox", "modernbert")
VOCABULARY = 64
HIDDEN = 32
LAYERS = 2

_FOLDERS = tempfile.TemporaryDirectory(prefix="cfm-backbones-")


#: What the configs have in common, and what each family calls or has otherwise.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": COMMON,
    "llama": {
        **COMMON,
        **ENDS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    },
    "gpt2": {
        **ENDS,
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 128,
    },
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
    "gpt_neox": {**COMMON, **ENDS},
    "modernbert": {**COMMON, **ENDS, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 1},
}


def _class(family: str) -> tuple[Any, dict[str, Any]]:
    """transformers' class of a family, and what to make it with."""
    import transformers as tf

    return {
        "bert": (tf.BertModel, {"add_pooling_layer": False}),
        "llama": (tf.LlamaForCausalLM, {}),
        "gpt2": (tf.GPT2LMHeadModel, {}),
        "t5": (tf.T5ForConditionalGeneration, {}),
        "gpt_neox": (tf.GPTNeoXForCausalLM, {}),
        "modernbert": (tf.ModernBertModel, {}),
    }[family]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(3, VOCABULARY))]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )


@functools.cache
def folder(family: str) -> Path:
    """The folder of a tiny model of `FAMILIES` or `FUSED`, made on first use."""
    path = Path(_FOLDERS.name) / family
    generator = torch.Generator().manual_seed((*FAMILIES, *FUSED).index(family))
    kind, options = _class(family)
    model = kind(kind.config_class(**CONFIGS[family]), **options)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:  # wide enough that attention and activations are far from linear
                wide = 0.5 if "embed" in name or "shared" in name or "wte" in name else 0.15
                value.copy_(wide * noise)
            else:
                value.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


#: What each loaded backbone looked like when it was last looked at, see `what_changed`.
_LOADED: dict[tuple[str, str], tuple[Backbone, set[tuple[str, str]]]] = {}


@functools.cache
def _loaded(family: str, dtype: str) -> Backbone:
    backbone = load_backbone(resolve(section(family, dtype)), dtype=dtype)
    _LOADED[family, dtype] = backbone, _marks(backbone)
    return backbone


def _marks(backbone: Backbone) -> set[tuple[str, str]]:
    """Hooks, modes and gradients of a backbone's modules: what a test could leave behind."""
    found = set()
    for name, module in backbone.model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            for key, hook in getattr(module, kind).items():
                # transformers' own for `output_hidden_states`: put in once, asleep otherwise
                if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
                    found.add((name, f"{kind} {key}"))
        for flag in ("training", "gradient_checkpointing"):
            if getattr(module, flag, False):
                found.add((name, flag))
        for parameter, value in module.named_parameters(recurse=False):
            if value.requires_grad or value.grad is not None:
                found.add((name, f"gradient of {parameter}"))
    return found


def what_changed() -> set[tuple[str, str]]:
    """Where the shared backbones are not as at the last call or load: (module, what)."""
    changed = set()
    for key, (backbone, before) in _LOADED.items():
        _LOADED[key] = backbone, _marks(backbone)
        changed |= before ^ _LOADED[key][1]
    return changed


def section(family: str, dtype: str = "float32") -> dict[str, Any]:
    """The ``backbone`` section of a run on the tiny model."""
    return {
        "id": f"tiny-{family}",
        "package": None,
        "path": str(folder(family)),
        "revision": None,
        "sha256": None,
        "dtype": dtype,
    }


def tiny(family: str, dtype: str = "float32") -> Backbone:
    """A tiny backbone with empty slots; the same object each time, for it never changes."""
    backbone = _loaded(family, dtype)
    backbone.slots.unplug()
    return backbone


def plain_model(family: str) -> Any:
    """The same model through transformers alone, float32, with transformers' own attention."""
    kind, options = _class(family)
    return kind.from_pretrained(folder(family), dtype=torch.float32, **options).eval()


def batch(backbone: Backbone, rows: int = 4, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random tokens, the rows padded to different lengths on the right.

    Encoder-decoders get ``decoder_input_ids`` of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row % 3 :] = 0
    made = {"input_ids": ids * mask, "attention_mask": mask}
    if backbone.family == "encoder-decoder":
        made["decoder_input_ids"] = torch.randint(
            3, VOCABULARY, (rows, length - 2), generator=generator
        )
    return made


def answers(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a backbone or a transformers or PEFT model makes of a batch, with gradients.

    Returns:
        Logits ``[rows, seq, vocabulary]``, or hidden states ``[rows, seq, hidden]`` of an encoder.
    """
    if isinstance(model, Backbone):
        if model.family == "encoder":
            return model.hidden_states(**inputs)
        return model.logits(**inputs)
    output = model(**inputs)
    return output.last_hidden_state if "logits" not in output else output.logits


def bare(backbone: Backbone, inputs: dict[str, Tensor]) -> Tensor:
    """The answers with empty slots, under ``inference_mode``."""
    with backbone.slots.plugged([]), torch.inference_mode():
        return answers(backbone, inputs)


def randomise(brick: torch.nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Adds noise to every parameter that a brick trains, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in brick.parameters():
            if value.requires_grad:
                value.add_(scale * torch.randn(value.shape, generator=generator))
