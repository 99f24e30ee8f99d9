"""The command line as a person meets it: help, errors, flags, and how little it loads for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cfm_train import paths
from cfm_train.config.catalogue import groups, recipes
from cfm_train.launch.cli import main

#: Packages that cost more than a tenth of a second each.
HEAVY = {"torch", "transformers", "pytorch_lightning", "peft", "wandb", "datasets", "torchmetrics"}

TYPO = ["recipe=task/classify", "name=x", "data.train=a.jsonl", "brick.rnk=8"]
TYPO_SENTENCE = "error: brick.rnk is no key of brick 'lora'. Did you mean 'brick.rank'?\n"


def run(*arguments: str, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; ``code`` runs after it in the same process."""
    program = (
        "import sys\n"
        "from cfm_train.launch.cli import main\n"
        f"status = main({list(arguments)!r})\n{code}\nsys.exit(status)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=env, capture_output=True, text=True
    )


def not_loaded(names: set[str]) -> str:
    return f"loaded = {names!r} & set(sys.modules)\nassert not loaded, loaded"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CFM_LIBRARY", raising=False)
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_everything_and_loads_nothing(arguments: list[str], here: Path) -> None:
    light = not_loaded(HEAVY | {"hydra", "pydantic", "numpy", "yaml"})
    done = run(*arguments, cwd=here, code=light)
    assert (done.returncode, done.stderr) == (0, "")
    for entry in recipes().values():
        assert any(
            entry.name in line and entry.purpose in line for line in done.stdout.splitlines()
        )
    for group, options in groups().items():
        assert f"\n{group}=…" in done.stdout
        assert all(entry.purpose in done.stdout for entry in options.values())
    assert not list(here.iterdir())


def test_python_m_answers(here: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "cfm_train", *TYPO],
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", TYPO_SENTENCE)


def test_help_for_one_recipe_shows_its_keys(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=task/classify", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "python -m cfm_train recipe=task/classify name=… data.train=…" in shown
    assert "tokens_per_batch:" in shown


def test_a_misspelt_key_loads_nothing_heavy_and_leaves_nothing(here: Path) -> None:
    done = run(*TYPO, cwd=here, code=not_loaded(HEAVY | {"numpy"}))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", TYPO_SENTENCE)
    assert not list(here.iterdir())


def test_wrong_data_beside_a_backbone_of_16_gb(here: Path) -> None:
    folder = here / "large"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(16 * 2**30)  # sparse: it takes no room, but reading it takes minutes
    backbone = ["backbone=hf", f"backbone.path={folder}"]
    done = run(*TYPO, *backbone, cwd=here, code=not_loaded(HEAVY))
    assert (done.returncode, done.stderr) == (2, TYPO_SENTENCE)
    done = run(*TYPO[:3], *backbone, cwd=here, code=not_loaded(HEAVY - {"datasets"}))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == ["large"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hlep"], "There is no flag '--hlep'. Did you mean '--help'?"),
        (["--cfg", "jb"], "--cfg takes one of job, hydra, all."),
        (["--cfg"], "--cfg takes one of job, hydra, all."),
        (
            ["recipe=task/sst2", "hydra.verbose=true"],
            "hydra.verbose=true counts in a sweep only: add -m, or leave it out.",
        ),
        (
            ["recipe=task/sst2", "hydra/launcher=ray"],
            "hydra/launcher=ray counts in a sweep only: add -m, or leave it out.",
        ),
        (
            ["-m", "recipe=task/sst2", "seed=1,2", "brick.rank=8,x"],
            "seed=1 brick.rank=x: brick.rank='x' does not fit: it must be a whole number.",
        ),
        (
            ["recipe=task/sst2,task/trec", "seed=1,2", "-m", "brick.rnk=8"],
            "recipe=task/sst2 seed=1: brick.rnk is no key of brick 'lora'. "
            "Did you mean 'brick.rank'?",
        ),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "data.root=absent"] if len(arguments) > 3 else arguments) == 2
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert not list(here.iterdir())


def test_cfg_job_prints_the_composed_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "recipe=task/classify", "name=1e5", "data.train=it's {a}, b"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["name"] == "1e5"
    assert shown["data"]["train"] == "it's {a}, b"
    assert shown["trainer"]["learning_rate"] == shown["brick"]["learning_rate"]
    assert main(["-c", "job", "recipe=task/classify"]) == 0  # what is missing shows as ???
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "???"
    assert main(["--cfg", "job", "-m", "recipe=task/sst2", "seed=1,2"]) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [one["seed"] for one in shown] == [1, 2]
    assert not list(here.iterdir())


def test_hydra_answers_its_own_flags(here: Path) -> None:
    done = run("--cfg", "all", "recipe=task/sst2", "name=a, b", cwd=here)
    assert done.returncode == 0
    shown = yaml.safe_load(done.stdout)
    assert shown["name"] == "a, b"
    assert shown["hydra"]["runtime"]["choices"]["recipe"] == "task/sst2"
    assert yaml.safe_load(run("--cfg", "hydra", cwd=here).stdout)["hydra"]["job"]
    assert "recipes://" in run("--info", "searchpath", cwd=here).stdout
    assert "== Flags ==" in run("--hydra-help", cwd=here).stdout
    assert not list(here.iterdir())


def test_a_reader_that_leaves_early_is_no_error(here: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    done = subprocess.run(
        f"{sys.executable} -m cfm_train --help | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=here,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
