"""A language model that nobody has trained yet: its tokenizer, its first weights, its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD, END = "<pad>", "</s>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019).

    It adds no token of its own: a document's first token is the first of its text, which is what a
    prompt begins with too.

    Args:
        texts: what it is trained on; the same texts give the same tokenizer.
        vocab_size: tokens in all, the 256 bytes and the two special ones among them.
        max_length: most tokens that the model takes.

    Returns:
        A ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def new_model(
    architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A Llama-type model with first weights, float32.

    Args:
        architecture: arguments of ``LlamaConfig``.
        tokenizer: for the vocabulary and the special tokens.
        seed: of the weights.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = dict(architecture)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": settings.pop("rope_theta")},
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """A transformers model folder: config, tokenizer, weights in a dtype.

    Args:
        model: the model; it is left as it is.
        tokenizer: its tokenizer.
        folder: where to; made if it is not there.
        dtype: of the weights on disk.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = type(model.config).from_dict(model.config.to_dict())
    copy = AutoModelForCausalLM.from_config(config, dtype=dtype)
    copy.load_state_dict(model.state_dict())
    logging.disable_progress_bar()  # of the one file that is written
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
