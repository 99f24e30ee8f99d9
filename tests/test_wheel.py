"""The wheel carries its recipes and works from any folder, far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from cfm_train import paths

CHECKOUT = Path(__file__).resolve().parent.parent
TAKEN = ("cfm_train", "conf", "recipes", "pyproject.toml", "setup.py", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in TAKEN:
        if (CHECKOUT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(CHECKOUT / name, source / name, ignore=ignored)
        else:
            shutil.copy(CHECKOUT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("cfm_train-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cfm_train", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_the_wheel_holds_every_file_of_the_project(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"cfm_train/{path.relative_to(CHECKOUT).as_posix()}"
        for folder in ("conf", "recipes")
        for path in (CHECKOUT / folder).rglob("*.yaml")
    } | {
        path.relative_to(CHECKOUT).as_posix()
        for path in (CHECKOUT / "cfm_train").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= inside
    assert {name.split("/")[0] for name in inside} == {"cfm_train", "cfm_train-0.1.0.dist-info"}


def test_help_is_the_checkout_s_help(installed: Path, tmp_path: Path) -> None:
    ours = run(CHECKOUT, tmp_path, "--help")
    theirs = run(installed, tmp_path, "--help")
    assert theirs.returncode == 0
    assert theirs.stdout == ours.stdout


def test_it_composes_checks_and_refuses_far_from_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    shown = run(installed, tmp_path, "--cfg", "job", "recipe=task/sst2", "brick.rank=4")
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["brick"]["rank"] == 4
    dry = run(installed, tmp_path, "recipe=task/quick_tone", "dry_run=true")
    assert (dry.returncode, dry.stderr) == (0, "")
    wrong = run(installed, tmp_path, "recipe=task/sst2", "brick.rnk=4")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert run(installed, tmp_path, "--version").stdout == "cfm_train 0.1.0\n"
    assert not list(tmp_path.iterdir())


def test_the_console_script_is_the_same_program(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / "cfm-train"), "recipe=sst2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: recipe=sst2: there is no recipe 'sst2'. Did you mean 'task/sst2'?\n"
    )


def test_the_checkout_finds_its_own_folders() -> None:
    assert paths.ROOT == CHECKOUT
