"""What `benchmarks/merge.py` merges: models, adapters, and the merge as each side is told it."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = [0.5, 0.3, 0.2]
#: Each rule as we call it.
RULES = {"linear": "linear", "ties": "ties/mergekit"}


def make_models(folder: Path, layers: int) -> None:
    """Writes ``base``, ``m1``, ``m2`` and ``m3``."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn, words = 1024, 2816, 32000
    shapes = {"model.embed_tokens.weight": (words, hidden), "lm_head.weight": (words, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (ffn, hidden) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{at}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": words, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }  # fmt: skip
    for number, name in enumerate(("base", "m1", "m2", "m3")):
        path = folder / name
        path.mkdir(parents=True)
        tensors = {}
        for place, (key, shape) in enumerate(shapes.items()):
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(place))
            drawn = drawn * 0.02 if len(shape) > 1 else 1 + drawn * 0.02
            if number:
                seed = 1000 * number + place
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                drawn = drawn + 0.004 * noise
            tensors[key] = drawn.bfloat16()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )


def make_adapters(folder: Path, layers: int, rank: int = 16) -> None:
    """Writes the PEFT adapters ``a1``, ``a2`` and ``a3``."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn = 1024, 2816
    for number in (1, 2, 3):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for n in range(layers):
            shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
            shapes |= {f"mlp.{p}_proj": (ffn, hidden) for p in ("gate", "up")}
            shapes["mlp.down_proj"] = (hidden, ffn)
            for module, (out, inn) in shapes.items():
                stem = f"base_model.model.model.layers.{n}.{module}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, inn, generator=draw) * 0.02
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * 0.02
        path = folder / f"a{number}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
            "lora_dropout": 0.0, "target_modules": names, "bias": "none", "inference_mode": True,
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))


def overrides_of(folder: Path, rule: str, out: Path, threads: int) -> list[str]:
    """The merge as a command of ours."""
    models = ",".join(str(folder / name) for name in ("m1", "m2", "m3"))
    base = [f"base={folder / 'base'}"] if rule == "ties" else []
    given = ",".join(map(str, WEIGHTS))
    return [
        "recipe=merge/models", f"models=[{models}]", f"out={out}", f"rule={RULES[rule]}",
        f"weights=[{given}]", f"threads={threads}", f"outputs={folder / 'outputs'}",
        f"library={folder / 'library'}", "tracking=disabled", *base,
    ]  # fmt: skip


def mergekit_config(folder: Path, rule: str) -> Path:
    """The same merge as a file for mergekit-yaml."""
    lines = ["merge_method: " + rule, "dtype: bfloat16"]
    if rule == "ties":
        lines += [f"base_model: {folder / 'base'}", "parameters:", "  normalize: true"]
    lines.append("models:")
    for name, weight in zip(("m1", "m2", "m3"), WEIGHTS, strict=True):
        lines += [f"  - model: {folder / name}", "    parameters:", f"      weight: {weight}"]
        lines += ["      density: 0.2"] if rule == "ties" else []
    path = folder / f"{rule}.yml"
    path.write_text("\n".join(lines) + "\n")
    return path
