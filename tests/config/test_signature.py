"""Method classes are read from their source: what is found, and what a class may not do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import pytest
from annotated_types import Ge

from cfm_train import paths
from cfm_train.config import signature, types
from cfm_train.config.quoting import TextKind
from cfm_train.config.validate import brick_text_keys


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty room of a package that holds nothing else."""
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    signature.kinds.cache_clear()
    signature.arguments.cache_clear()
    yield_to = tmp_path / "room"
    yield_to.mkdir()
    return yield_to


@pytest.fixture(autouse=True)
def fresh() -> None:
    signature.kinds.cache_clear()
    signature.arguments.cache_clear()


def test_what_is_read_is_what_python_sees() -> None:
    import importlib

    from cfm_train.bricks.kinds import brick_class

    for kind in signature.kinds("bricks", "Brick"):
        cls = brick_class(kind)
        importlib.import_module(cls.__module__)
        real = get_type_hints(cls.__init__, include_extras=True)
        real.pop("return", None)
        assert signature.arguments("bricks", kind, "Brick") == real
        assert list(real) == list(inspect.signature(cls).parameters)


def test_a_method_by_its_base(room: Path) -> None:
    (room / "one.py").write_text(
        "from cfm_train.room.base import Base\n"
        "class _Helper: pass\n"
        "class Other: pass\n"
        "class One(Base):\n"
        "    def __init__(self, a: int, *, b: Literal['x', 'y'] | None, c: Positive,\n"
        "                 d: Annotated[list[str], Prose()]) -> None: ...\n"
    )
    (room / "two.py").write_text("from cfm_train.room.one import One\nclass Two(One): pass\n")
    (room / "three.py").write_text("class Middle(base.Base): pass\nclass Three(Middle): pass\n")
    (room / "tools.py").write_text("class Tool: pass\n")
    (room / "base.py").write_text("class Base: pass\n")
    assert signature.kinds("room", "Base") == ("one", "three", "two")
    expected = {
        "a": int,
        "b": Literal["x", "y"] | None,
        "c": Annotated[int, Ge(1)],
        "d": Annotated[list[str], types.Prose()],
    }
    assert signature.arguments("room", "one", "Base") == expected
    assert signature.arguments("room", "two", "Base") == expected  # inherited
    assert signature.arguments("room", "three", "Base") == {}


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("a: int = 3", "has a default; defaults stand in the YAML"),
        ("*, a: int = 3", "has a default; defaults stand in the YAML"),
        ("a", r"__init__\(a\) has no annotation"),
        ("a: torch.Tensor", "'torch.Tensor' cannot be read without imports"),
        ("a: __import__('os')", "cannot be read without imports"),
    ],
)
def test_a_class_that_breaks_the_contract(room: Path, written: str, complaint: str) -> None:
    (room / "one.py").write_text(
        f"class One(Base):\n    def __init__(self, {written}) -> None: ...\n"
    )
    with pytest.raises(signature.SignatureError, match=complaint):
        signature.arguments("room", "one", "Base")


def test_texts_among_a_brick_s_parameters() -> None:
    brick_text_keys.cache_clear()
    found = brick_text_keys()
    assert found["brick.sites"] == TextKind(many=True, one=False)
    assert "brick.rank" not in found


def test_reading_signatures_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from cfm_train.config import signature\n"
        "assert 'lora' in signature.kinds('bricks', 'Brick')\n"
        "signature.arguments('bricks', 'lora', 'Brick')\n"
        "assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)
