"""Merging whole models and adapters, side by side with mergekit and PEFT in one run.

    python benchmarks/merge.py --repeats 5 --out merge.json

Models: three Llamas (hidden 1024, 12 layers, ffn 2816, vocabulary 32000, untied: 220 M parameters,
bfloat16), a random base plus N(0, .004), and the base; one shard each. Every arm is a process of
its own, arms take turns, and the table shows medians over the repeats.

``copy N+1``   reads N models piece by piece and writes one, flushed as the merges are: what no
               merge of these files can be faster than on this machine
``cfm``        `cfm_train.merging.models.merge.merge_models`, from opened headers to the renamed
               folder, timed inside the process (imports not counted); memory is the peak of RssAnon
               of the whole process, sampled from /proc
``cfm run``    the whole command ``python -m cfm_train recipe=merge/models …``, start to end
``mergekit``   the whole command ``mergekit-yaml``; net of the time of ``mergekit-yaml --help``

Linear weighs .5, .3, .2; ties is ``ties/mergekit`` at density .2. Their values are compared with
mergekit's: of numbers as large as the threshold of a trim, we keep the first ones so that exactly k
stay, and mergekit keeps those that its sort leaves first, so outputs may differ there and nowhere
else.

Adapters: three LoRAs of rank 16 on the seven projections of the same model (84 modules, float32),
merged in ΔW at rank 16. PEFT: ``add_weighted_adapter(combination_type="svd",
svd_full_matrices=False)``, the call alone, model loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WEIGHTS = [0.5, 0.3, 0.2]
RULES: dict[str, tuple[str, int]] = {"linear": ("linear", 3), "ties": ("ties/mergekit", 4)}
#: What the issue asks for: at most so many times the copy; bytes of anonymous memory.
TARGETS = {"linear": 2.0, "ties": 20.0, "anonymous": 250e6, "adapters": 0.3}
PIECE = 1 << 22


# -- what is merged --------------------------------------------------------------------------------


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


# -- arms ------------------------------------------------------------------------------------------


def copy(models: list[Path], out: Path) -> dict[str, float]:
    """Reads all models, writes the last one's bytes, flushed and renamed as a merge is."""
    from cfm_train.backbone.folders import written_aside

    began = time.perf_counter()
    with written_aside(out) as folder:
        buffer = memoryview(bytearray(PIECE))
        for number, model in enumerate(models):
            last = number == len(models) - 1
            with (model / "model.safetensors").open("rb", buffering=0) as source:
                if not last:
                    while source.readinto(buffer):
                        pass
                    continue
                with (folder / "model.safetensors").open("wb", buffering=0) as target:
                    while count := source.readinto(buffer):
                        target.write(buffer[:count])
    return {"seconds": time.perf_counter() - began}


def ours(folder: Path, rule: str, out: Path, threads: int) -> dict[str, float]:
    """The merge alone."""
    import torch  # noqa: F401 (its import is no part of the merge)

    from cfm_train.launch.job import prepare
    from cfm_train.operations import merge_models as operation

    option, _ = RULES[rule]
    overrides = _overrides(folder, rule, option, out, threads)
    job = prepare(overrides)  # hashes the inputs, as the run does; known afterwards
    from cfm_train.merging.models import merge as engine

    began = time.perf_counter()
    inputs = job.inputs
    engine.merge_models(
        operation.task_of(inputs),
        inputs.out,
        companion=inputs.companion.backbone.folder,
        texts={"config.json": operation.new_config(job.config, inputs)},
        shard_bytes=job.config["shard_bytes"],
        threads=threads,
    )
    return {"seconds": time.perf_counter() - began}


def _overrides(folder: Path, rule: str, option: str, out: Path, threads: int) -> list[str]:
    models = ",".join(str(folder / name) for name in ("m1", "m2", "m3"))
    base = [f"base={folder / 'base'}"] if rule == "ties" else []
    given = ",".join(map(str, WEIGHTS))
    return [
        "recipe=merge/models", f"models=[{models}]", f"out={out}", f"rule={option}",
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


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command; its wall and CPU seconds, its peak of anonymous memory, its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    printed = process.communicate()[0].strip().splitlines()
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: run it by hand.")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return {"wall": wall, "cpu": cpu, "anonymous": peak, "line": printed[-1] if printed else ""}


def arm(name: str, folder: Path, out: Path, *more: str) -> dict[str, Any]:
    """An arm of ours in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    found = measured([sys.executable, __file__, "--arm", name, str(folder), str(out), *more])
    return {**found, **json.loads(found["line"])}


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


# -- adapters --------------------------------------------------------------------------------------


def adapters(folder: Path, out: Path) -> dict[str, float]:
    """The merge of three adapters, between read files and factors, and with files."""
    from cfm_train.merging.files.adapters import open_adapters
    from cfm_train.merging.files.merge import merge_adapters

    paths = [folder / name for name in ("a1", "a2", "a3")]
    given = {"space": "delta", "rank": 16}
    merge_adapters(open_adapters(paths), WEIGHTS, "linear", given)
    began = time.perf_counter()
    opened = open_adapters(paths)
    read = time.perf_counter()
    merged = merge_adapters(opened, WEIGHTS, "linear", given)
    done = time.perf_counter()
    merged.write(out)
    return {"seconds": done - read, "files": time.perf_counter() - began}


def peft(folder: Path) -> dict[str, float]:
    """The same by PEFT's svd, and how far the two results are apart."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "m1", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "a1", adapter_name="a1")
    for name in ("a2", "a3"):
        model.load_adapter(folder / name, adapter_name=name)
    began = time.perf_counter()
    model.add_weighted_adapter(
        ["a1", "a2", "a3"], WEIGHTS, "both", "svd", svd_rank=16, svd_full_matrices=False
    )
    seconds = time.perf_counter() - began
    ours = load_file(folder / "adapter" / "adapter_model.safetensors")
    worst = 0.0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "both" in module.lora_A:
            theirs = module.get_delta_weight("both")
            found = ours[f"{name}.lora_B.weight"] @ ours[f"{name}.lora_A.weight"]
            worst = max(worst, ((found - theirs).norm() / theirs.norm()).item())
    return {"seconds": seconds, "apart": worst}


# -- the table -------------------------------------------------------------------------------------


def middle(found: list[dict[str, Any]], key: str) -> float:
    """The median of a figure."""
    return statistics.median(one[key] for one in found)


def main() -> int:
    """Runs all arms and prints the tables; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of the models")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--mergekit-repeats", type=int, default=1)
    parser.add_argument("--no-peft", action="store_true", help="skip PEFT's svd (half a minute)")
    parser.add_argument("--no-adapters", action="store_true")
    parser.add_argument("--folder", type=Path, help="where models are made (default: temporary)")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--arm", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(_arm(*options.arm)))
        return 0
    with tempfile.TemporaryDirectory(prefix="cfm-merge-") as temporary:
        folder = options.folder or Path(temporary)
        found = run(folder, options)
    show(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(found["passed"].values()) else 1


def _arm(name: str, folder: str, out: str, *more: str) -> dict[str, float]:
    where, target = Path(folder), Path(out)
    arms: dict[str, Callable[[], dict[str, float]]] = {
        "copy": lambda: copy([where / model for model in more], target),
        "ours": lambda: ours(where, more[0], target, int(more[1])),
        "adapters": lambda: adapters(where, target),
        "peft": lambda: peft(where),
    }
    return arms[name]()


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All arms in turns."""
    small = folder / "small"
    if not (folder / "m3" / "config.json").is_file():
        make_models(folder, options.layers)
        make_models(small, max(1, options.layers // 4))
        make_adapters(folder, options.layers)
    threads = str(options.threads)
    figures: dict[str, list[dict[str, Any]]] = {}

    def keep(key: str, found: dict[str, Any]) -> None:
        figures.setdefault(key, []).append({k: v for k, v in found.items() if k != "line"})

    models = {"linear": ["m1", "m2", "m3"], "ties": ["base", "m1", "m2", "m3"]}
    kit = str(Path(sys.executable).parent / "mergekit-yaml")
    for turn in range(options.repeats):
        for rule in options.rules:
            keep(f"copy/{rule}", arm("copy", folder, folder / "copy", *models[rule]))
            keep(f"ours/{rule}", arm("ours", folder, folder / f"ours-{rule}", rule, threads))
        keep("small/linear", arm("ours", small, small / "ours", "linear", threads))
        if not options.no_adapters:
            keep("adapters", arm("adapters", folder, folder / "adapter"))
        if options.no_mergekit or turn >= options.mergekit_repeats:
            continue
        keep("mergekit/help", measured([kit, "--help"]))
        for rule in options.rules:
            out = folder / f"mergekit-{rule}"
            shutil.rmtree(out, ignore_errors=True)
            flags = ["--no-copy-tokenizer", "--quiet", "--no-write-model-card"]
            config = str(mergekit_config(folder, rule))
            keep(f"mergekit/{rule}", measured([kit, config, str(out), *flags]))
            whole = folder / "run"
            shutil.rmtree(whole, ignore_errors=True)
            shutil.rmtree(folder / "outputs", ignore_errors=True)
            overrides = _overrides(folder, rule, RULES[rule][0], whole, options.threads)
            keep(f"run/{rule}", measured([sys.executable, "-m", "cfm_train", *overrides]))
    if not options.no_peft and not options.no_adapters:
        keep("peft", arm("peft", folder, folder / "adapter-peft"))
    return summary(folder, figures, options)


def summary(
    folder: Path, figures: dict[str, list[dict[str, Any]]], options: argparse.Namespace
) -> dict[str, Any]:
    """Medians, ratios, and what holds of the targets."""
    rows = {}
    passed = {}
    for rule in options.rules:
        limit, mine = middle(figures[f"copy/{rule}"], "seconds"), figures[f"ours/{rule}"]
        each = [
            a["seconds"] / b["seconds"] for a, b in zip(mine, figures[f"copy/{rule}"], strict=True)
        ]
        row = {
            "copy": limit,
            "seconds": middle(mine, "seconds"),
            "ratio": statistics.median(each),
            "cpu": middle(mine, "cpu"),
            "anonymous": max(one["anonymous"] for one in mine),
        }
        if f"mergekit/{rule}" in figures:
            row["mergekit"] = middle(figures[f"mergekit/{rule}"], "wall")
            row["mergekit net"] = row["mergekit"] - middle(figures["mergekit/help"], "wall")
            row["mergekit anonymous"] = max(o["anonymous"] for o in figures[f"mergekit/{rule}"])
            row["run"] = middle(figures[f"run/{rule}"], "wall")
            row |= differences(folder / f"ours-{rule}", folder / f"mergekit-{rule}")
        rows[rule] = row
        passed[rule] = row["ratio"] <= TARGETS[rule]
    if "linear" in rows:
        rows["linear"]["anonymous, a quarter of the layers"] = max(
            one["anonymous"] for one in figures["small/linear"]
        )
        passed["anonymous"] = rows["linear"]["anonymous"] <= TARGETS["anonymous"]
    if "adapters" in figures:
        rows["adapters"] = {k: middle(figures["adapters"], k) for k in ("seconds", "files")}
        passed["adapters"] = rows["adapters"]["seconds"] <= TARGETS["adapters"]
        if "peft" in figures:
            rows["adapters"]["peft"] = middle(figures["peft"], "seconds")
            rows["adapters"]["apart"] = middle(figures["peft"], "apart")
    return {
        "rows": rows,
        "passed": passed,
        "load": os.getloadavg(),
        "threads": options.threads,
        "figures": figures,
    }


def show(found: dict[str, Any]) -> None:
    """The tables."""
    for rule, row in found["rows"].items():
        print(f"\n{rule}")
        for key, value in row.items():
            shown = f"{value / 1e6:.0f} MB" if "anonymous" in key else f"{value:.3g}"
            print(f"  {key:<36} {shown}")
    print(f"\nload {found['load'][0]:.1f}, threads {found['threads']}")
    for key, holds in found["passed"].items():
        print(f"{'holds ' if holds else 'MISSED'} {key}: {TARGETS[key]:g}")


if __name__ == "__main__":
    sys.exit(main())
