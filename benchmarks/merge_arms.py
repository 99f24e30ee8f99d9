"""The arms of `benchmarks/merge.py`, each of which runs in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.merge_inputs import WEIGHTS, overrides_of

PIECE = 1 << 22


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

    job = prepare(
        overrides_of(folder, rule, out, threads)
    )  # hashes the inputs, as the run does; known afterwards
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


def adapters(folder: Path, out: Path) -> dict[str, float]:
    """The merge of three adapters: of what is in memory, and from files to files."""
    from cfm_train.bricks.lora import LoRA
    from cfm_train.merging import engine
    from cfm_train.merging.files.adapters import CONFIG_FILE, TENSOR_FILE, open_adapters
    from cfm_train.merging.files.merge import merge_adapters, parameters_of
    from cfm_train.merging.mix import make_mix

    paths = [folder / name for name in ("a1", "a2", "a3")]
    given = {"space": "delta", "rank": 16}
    frame: Any = open_adapters(paths).frame
    bricks = [
        LoRA.restore(
            {}, {name: (p / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE)}, frame
        )
        for p in paths
    ]
    mix = make_mix(parameters_of("linear", given))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        engine.merge(bricks, WEIGHTS, mix, frame)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    merge_adapters(open_adapters(paths), WEIGHTS, "linear", given).write(out)
    files = time.perf_counter() - began
    return {"seconds": statistics.median(seconds[1:]), "files": files}


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


def arm(name: str, folder: str, out: str, *more: str) -> dict[str, float]:
    """One of the above, by its name."""
    where, target = Path(folder), Path(out)
    arms: dict[str, Callable[[], dict[str, float]]] = {
        "copy": lambda: copy([where / model for model in more], target),
        "ours": lambda: ours(where, more[0], target, int(more[1])),
        "adapters": lambda: adapters(where, target),
        "peft": lambda: peft(where),
    }
    return arms[name]()
