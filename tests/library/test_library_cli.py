"""The command line: what it says, what it costs, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cfm_train.library.__main__ import main
from cfm_train.library.card import Card
from cfm_train.library.store import Library

SCORE = {"value": 0.86, "low": 0.84, "high": 0.88, "n": 100}


@pytest.fixture
def filled(local, bricks):  # type: ignore[no-untyped-def]
    """Three bricks, one with an older version, one merged of the others."""
    bricks.add(local, 0)
    sst2 = bricks.add(
        local,
        1,
        backbone_id="minilm",
        requires=["f" * 64],
        heads={"sst2": {"task": "classification", "labels": ["negative", "positive"]}},
        metrics={"test/accuracy": SCORE},
        data=[{"name": "sst2", "fingerprint": "d" * 64, "licence": "cc0-1.0"}],
        sites=["layer.0.attn.q"],
    )
    trec = bricks.add(local, 2, "trec")
    parents = [{"name": card.name, "version": card.version} for card in (sst2, trec)]
    expression = f"merge(linear, [{sst2.ref}, {trec.ref}])"
    bricks.add(local, 3, "both", parents=parents, expression=expression)
    return local


@pytest.fixture
def run(filled, capsys):  # type: ignore[no-untyped-def]
    """Runs a command on the filled library; returns exit code, output and errors."""

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["--library", filled.root, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_ls(run, filled):
    code, out, err = run("ls")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["name", "both", "sst2", "trec"]
    version = filled.find("sst2").version
    assert f"{version} (+1)" in lines["sst2"]
    for part in ("lora", "minilm", "negative/positive", "test/accuracy 0.860 [0.840, 0.880]"):
        assert part in lines["sst2"]
    assert lines["sst2"].split()[-2:][1] == "s", "the age in seconds"

    rows = {row["name"]: row for row in json.loads(run("ls", "--json")[1])}
    assert rows["sst2"]["metric"] == {"name": "test/accuracy", **SCORE}
    assert rows["sst2"]["versions"] == 2 and rows["trec"]["metric"] is None
    card = filled.find("sst2")
    sizes = [(filled.folder(card) / name).stat().st_size for name in card.files]
    assert rows["sst2"]["bytes"] == sum(sizes)


def test_ls_shows_the_others_when_one_card_is_damaged(run, filled):
    card = filled.find("trec")
    (filled.folder(card) / "brick.json").write_text("{")
    code, out, err = run("ls")
    assert code == 2 and "trec" in err and "is not a card" in err and err.count("\n") == 1
    assert "sst2" in out and "both" in out


def test_show(run, filled):
    code, out, _ = run("show", "sst2")
    assert code == 0
    for part in ("f" * 64, "cc0-1.0", "classification (negative, positive)", "layer.0.attn.q"):
        assert part in out
    assert json.loads(run("show", "both", "--json")[1])["name"] == "both"


def test_lineage(run, filled):
    code, out, _ = run("lineage", "both")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[0].startswith(filled.find("both").ref) and "merge(linear" in lines[0]
    assert filled.find("sst2").ref in lines[1] and filled.find("trec").ref in lines[2]
    tree = json.loads(run("lineage", "both", "--json")[1])
    assert [parent["name"] for parent in tree["parents"]] == ["sst2", "trec"]


def test_verify(run, filled):
    assert run("verify") == (0, "4 checked, all as it was written.\n", "")
    assert run("verify", "sst2")[:2] == (0, "1 checked, all as it was written.\n")
    for name in ("sst2", "trec"):
        (filled.folder(filled.find(name)) / "brick.safetensors").write_bytes(b"x")
    code, out, err = run("verify")
    assert (code, out) == (2, "") and len(err.splitlines()) == 2
    assert all(
        line.startswith("error: ") and "has changed since" in line for line in err.splitlines()
    )


def test_rm_and_gc(run, filled):
    code, _, err = run("rm", "trec")
    assert code == 2 and "is a parent of both@" in err
    assert run("rm", "both")[0] == 0
    assert run("rm", "trec")[1].endswith("is deleted.\n")
    filled.storage.put("trec/0123456789ab/brick.safetensors", b"half")
    assert run("gc")[1] == "0 deleted.\n", "it is too young"
    assert run("gc", "--grace", "-60", "--dry-run")[1] == "trec/0123456789ab\n1 would go.\n"
    assert run("gc", "--grace", "-60")[1] == "trec/0123456789ab\n1 deleted.\n"
    assert run("verify")[0] == 0


def test_push_and_pull(run, filled, tmp_path):
    box = str(tmp_path / "box")
    assert run("push", "sst2", box)[0] == 0
    code, out, _ = run("pull", box, "--name", "again")
    assert code == 0 and out.startswith(f"again@{filled.find('sst2').version}")
    code, out, err = run("pull", "nobody/nothing")
    assert (code, out) == (2, "") and err.startswith("error: The Hub repository 'nobody/nothing'")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "sst3"), "Did you mean 'sst2'?"),
        (("show", "../../etc"), "cannot name an artifact"),
        (("lineage", "sst2@zz"), "after '@' comes the beginning of a version"),
        (("verify", "nothing"), "There is no 'nothing'"),
        (("rm", "sst2"), "has 2 versions"),
        (("export", "sst2", "out"), "for which PEFT has no format"),
        (("add", "gone", "--name", "x"), "There is no folder gone"),
        (("add", ".", "--name", "../x"), "cannot name an artifact"),
        (("pull", "gone"), "holds no artifact"),
        (("pull", "gone", "--name", "a/b"), "cannot name an artifact"),
    ],
)
def test_wrong_input_is_one_sentence(
    run, filled, tmp_path, snapshot, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and sentence in err and len(err.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_unknown_commands_exit_with_2():
    for arguments in (["lss"], ["show"], ["add", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_the_default_library(tmp_path, monkeypatch, capsys, bricks):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFM_LIBRARY", raising=False)
    assert main(["ls"]) == 0
    assert capsys.readouterr().out == "No bricks yet in outputs/library.\n"
    assert list(tmp_path.iterdir()) == [], "looking makes no folder"
    bricks.add(Library(tmp_path / "elsewhere"))
    monkeypatch.setenv("CFM_LIBRARY", "elsewhere")
    assert main(["ls"]) == 0 and "sst2" in capsys.readouterr().out


def test_a_named_library_that_is_not_there(tmp_path, capsys):
    root = str(tmp_path / "none")
    for command in (["ls"], ["ls", "--json"], ["show", "sst2"], ["verify"], ["gc"]):
        assert main(["--library", root, *command]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"error: There is no library {root}: correct --library.\n")
    (tmp_path / "none").mkdir()
    assert main(["--library", root, "ls"]) == 0
    assert capsys.readouterr().out == f"No bricks yet in {root}.\n"


def test_a_library_elsewhere(tmp_path, bricks, capsys):
    root = f"memory://{tmp_path.name}/far"
    bricks.add(Library(root))
    assert main(["--library", root, "ls"]) == 0 and "sst2" in capsys.readouterr().out
    assert main(["--library", root, "verify"]) == 0
    assert main(["--library", "nowhere://x", "ls"]) == 2
    assert "'nowhere://x' cannot be used" in capsys.readouterr().err


def adapter(folder: Path) -> Path:
    """A LoRA adapter as small as they come."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.encoder.layer.0.attention.self.query"
    a, b = np.ones((1, 4), np.float32), np.ones((4, 1), np.float32)
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# mine\n")
    return folder


def test_add_with_a_backbone(run, filled, tmp_path):
    folder = str(adapter(tmp_path / "adapter"))
    code, out, _ = run("add", folder, "--name", "free")
    assert code == 0 and "names no backbone that can be checked" in out
    assert filled.find("free").licence == "apache-2.0"

    assert run("add", folder, "--name", "known", "--backbone", "a" * 64, "--licence", "mit")[0] == 0
    known = filled.find("known")
    assert known.requires == ["a" * 64] and known.licence == "mit"
    assert known.version != filled.find("free").version, "what it fits is part of what it is"

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "tokenizer.json").write_text("{}")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    save_file({query: np.ones((4, 4), np.float32)}, model / "model.safetensors")
    assert run("add", folder, "--name", "fits", "--backbone", str(model))[0] == 0
    from cfm_train.backbone.fingerprint import fingerprint, tokenizer_hash

    fits = filled.find("fits")
    assert fits.requires == [fingerprint(model)] and fits.tokenizer == tokenizer_hash(model)
    assert fits.backbone_id == "model"
    code, _, err = run("add", folder, "--name", "lost", "--backbone", str(tmp_path / "gone"))
    assert code == 2 and "There is no backbone folder" in err


def test_an_adapter_of_another_backbone_is_refused(run, filled, tmp_path):
    """By the names and shapes of its modules; the library stays as it was."""
    folder, model = adapter(tmp_path / "adapter"), tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").write_text("{}")
    held = {"model.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32)}
    save_file(held, model / "model.safetensors")
    root = Path(filled.root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    code, out, err = run("add", str(folder), "--name", "lost", "--backbone", str(model))
    assert (code, out) == (2, "")
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert err == (
        f"error: The adapter {folder} does not fit the backbone 'llama', which has none of its "
        "modules ('base_model.model.encoder.layer.0.attention.self.query.lora_A.weight', …): "
        "name the backbone that it was trained on.\n"
    )


@pytest.fixture
def exported(run, filled, tmp_path):  # type: ignore[no-untyped-def]
    """A brick in PEFT's format with head and history, and the folder that it was exported to."""
    peft = adapter(tmp_path / "adapter")
    files = {path.name: path for path in peft.iterdir()}
    files["heads.safetensors"] = tmp_path / "heads.safetensors"
    save_file({"t.linear.weight": np.ones((2, 4), np.float32)}, files["heads.safetensors"])
    card = Card(
        name="mine",
        kind="lora",
        operation="train",
        sites=["layer.0.attn.q"],
        requires=["b" * 64],
        heads={"t": {"task": "classification", "labels": ["no", "yes"]}},
        interface={"kind": "lora"},
        recipe={"seed": 3},
        metrics={"test/accuracy": SCORE},
        run="mine-1",
    )
    stored = filled.add(files, card)
    folder = tmp_path / "exported"
    assert run("export", "mine", str(folder))[0] == 0
    return stored, folder


def test_an_export_comes_back_as_what_it_was(run, filled, exported):
    """Heads, figures and history; under another name, the same version."""
    stored, folder = exported
    (folder / "README.md").write_text("# rewritten by hand\n")
    code, out, err = run("add", str(folder), "--name", "again", "--backbone", "b" * 64)
    assert (code, err) == (0, "")
    assert f"The folder is {stored.ref} as it was exported: its heads (t) and its card came" in out
    again = filled.find("again")
    assert again.version == stored.version
    assert again.to_dict() == {**stored.to_dict(), "name": "again", "files": again.files}
    assert {n: h for n, h in again.files.items() if n != "README.md"} == {
        n: h for n, h in stored.files.items() if n != "README.md"
    }
    assert filled.verify("again") == []
    assert run("add", str(folder), "--name", "free", "--licence", "mit")[0] == 0
    assert filled.find("free").licence == "mit"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("tensors", "adapter_model.safetensors has changed since mine@"),
        ("heads", "heads.safetensors has changed since mine@"),
        ("no heads", "heads.safetensors is missing, which the card of mine@"),
        ("config", "adapter_config.json has changed since mine@"),
        ("sites", "brick.json was edited: its tensors and interface give version"),
        ("card", "is not a card: it is not valid JSON"),
        ("backbone", "was made for another backbone than --backbone."),
        ("kind", "is of kind lora, and --kind asks for peft."),
    ],
)
def test_an_export_that_is_no_longer_what_it_was_is_foreign(run, filled, exported, change, why):
    """Another adapter by now: it comes without heads and figures, and the screen says why."""
    stored, folder = exported
    more = {"backbone": ("--backbone", "c" * 64), "kind": ("--kind", "peft")}.get(change, ())
    if change == "tensors":
        stem = "base_model.model.encoder.layer.0.attention.self.query"
        a, b = np.ones((1, 4), np.float32), 2 * np.ones((4, 1), np.float32)
        tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        save_file(tensors, folder / "adapter_model.safetensors")
    elif change == "heads":
        weight = np.zeros((2, 4), np.float32)
        save_file({"t.linear.weight": weight}, folder / "cfm_train" / "heads.safetensors")
    elif change == "no heads":
        (folder / "cfm_train" / "heads.safetensors").unlink()
    elif change == "config":
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 2'))
    elif change == "sites":
        path = folder / "cfm_train" / "brick.json"
        path.write_text(path.read_text().replace("layer.0.attn.q", "layer.1.attn.q"))
    elif change == "card":
        (folder / "cfm_train" / "brick.json").write_text("{")
    code, out, err = run("add", str(folder), "--name", "again", *more)
    assert (code, err) == (0, "")
    assert "It comes as a foreign adapter, without heads and card: " in out and why in out
    again = filled.find("again")
    assert again.heads == {} and again.metrics == {} and again.operation == "add"
    assert again.version != stored.version and filled.verify("again") == []


HEAVY = ("torch", "transformers", "peft", "lightning", "pytorch_lightning", "wandb", "datasets")


def test_looking_is_light(filled, tmp_path):
    """In a process of its own: none of the packages that take seconds to import is imported."""
    folder = adapter(tmp_path / "adapter")
    code = (
        "import sys\nfrom cfm_train.library.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    commands = (
        ["ls"], ["ls", "--json"], ["show", "sst2"], ["lineage", "both"], ["verify"], ["gc"],
        ["add", str(folder), "--name", "x"], ["export", "x", str(tmp_path / "out")],
    )  # fmt: skip
    for command in commands:
        arguments = [sys.executable, "-c", code, "--library", filled.root, *command]
        job = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert (job.returncode, job.stderr) == (0, "[]\n"), (command, job.stderr)


def test_the_output_can_be_cut_short(filled):
    command = (
        f"'{sys.executable}' -m cfm_train.library --library '{filled.root}' ls --json | head -1"
    )
    job = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert job.stdout == "[\n" and "Traceback" not in job.stderr


def test_without_a_command_it_tells_what_there_is(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for line in ("ls ", "verify ", "list the bricks", "hash everything again"):
        assert line in said.err
