"""The gate: sound safetensors pass with equal values, all else is refused with a sentence."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from cfm_train.errors import UserError
from cfm_train.library import gate
from cfm_train.library.tensorfile import read_header

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Values that are no numbers, in each format that has them: e4m3fn has NaN but no infinity.
NOT_FINITE = [
    (dtype, float(value))
    for dtype in (*FLOATS, *EIGHT_BITS, torch.complex64)
    for value in ("nan", "inf", "-inf")
    if value == "nan" or dtype != torch.float8_e4m3fn
]
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def make(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file by hand, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


def test_reads_what_safetensors_wrote(tmp_path):
    """Every dtype, an empty tensor, a scalar; torch as stored, NumPy by value."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}.{dtype}".replace("torch.", ""): torch.randn(3, 5, generator=generator).to(dtype)
        for i, dtype in enumerate((*FLOATS, *INTEGERS, *EIGHT_BITS, torch.complex64))
    }
    tensors |= {"empty": torch.zeros(0, 7), "scalar": torch.tensor(3.5)}
    path = write(tmp_path, save(tensors, metadata={"format": "pt"}))

    read = gate.read_tensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert (
            torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))
            if tensor.dim()
            else True
        )

    plain = {name: t for name, t in tensors.items() if t.dtype not in EIGHT_BITS}
    arrays = gate.read_tensors(write(tmp_path, save(plain)), framework="np")
    for name, tensor in plain.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert np.array_equal(arrays[name], expected.numpy()) and arrays[name].flags.writeable
    with pytest.raises(UserError, match="NumPy has no F8_E4M3 for tensor"):
        gate.read_tensors(write(tmp_path, save({"a": torch.zeros(2).to(EIGHT_BITS[0])})), "np")


def test_offsets_agree_with_safetensors_own_parser():
    content = save({"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.int64)})
    ours = read_header(io.BytesIO(content), "x")
    theirs = load(content)
    assert ours.keys() == theirs.keys()
    for name, info in ours.items():
        assert content[info.begin : info.end] == theirs[name].numpy().tobytes()
        assert info.shape == tuple(theirs[name].shape)


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, dtype, value):
    tensor = torch.ones(40, 30).to(dtype)
    tensor.view(-1)[777] = value
    path = write(tmp_path, save({"fine": torch.ones(2), "layer.0.lora_B": tensor}))
    with pytest.raises(UserError, match=r"1 of the values of tensor 'layer\.0\.lora_B'"):
        gate.check_tensors(path)
    with pytest.raises(UserError, match="NaN or infinite"):
        gate.read_tensors(path)


def test_every_finite_bit_pattern_passes_and_no_other(tmp_path):
    """All 65,536 values of both half formats and all 256 of the small ones, against torch."""
    for dtype, integer in (
        (torch.float16, torch.int16),
        (torch.bfloat16, torch.int16),
        (torch.float8_e4m3fn, torch.uint8),
        (torch.float8_e5m2, torch.uint8),
    ):
        bits = torch.arange(2 ** (16 if integer is torch.int16 else 8)).to(torch.int32)
        values = bits.to(integer).view(dtype)
        finite = values.to(torch.float32).isfinite()
        gate.check_tensors(write(tmp_path, save({"a": values[finite].clone()})))
        expected = int((~finite).sum())
        with pytest.raises(UserError, match=rf"{expected} of the values"):
            gate.check_tensors(write(tmp_path, save({"a": values})))


F32 = {"dtype": "F32", "shape": [2]}
AT_0 = {**F32, "data_offsets": [0, 8]}
WRONG = {
    "empty": (b"", "0 bytes are too few"),
    "short": (b"\x01\x02", "too few for a header"),
    "header longer than the file": (make({}, b"", length=10**6), "announces a header of 1000000"),
    "header of 2^63": (make({}, b"", length=2**63), "announces a header"),
    "not JSON": (make(b"{nope", b""), "header is not JSON"),
    "not UTF-8": (make(b'{"\xff": 1}', b""), "header is not JSON"),
    "deeply nested": (make(b"[" * 100_000, b""), "header is not JSON"),
    "a list": (make(b"[]", b""), "no JSON object"),
    "a name twice": (
        make(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
             b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "twice",
    ),
    "no dtype": (make({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "lacks dtype"),
    "no offsets": (make({"a": F32}, bytes(8)), "lacks dtype, shape or offsets"),
    "one offset": (make({"a": {**F32, "data_offsets": [0]}}, bytes(8)), "lacks dtype"),
    "entry is a text": (make({"a": "F32"}, bytes(8)), "lacks dtype"),
    "unknown dtype": (make({"a": {**AT_0, "dtype": "F99"}}, bytes(8)), "F99"),
    "dtype a list": (make({"a": {**AT_0, "dtype": []}}, bytes(8)), "dtype"),
    "negative shape": (
        make({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, bytes(8)),
        "no whole number",
    ),
    "shape of true": (
        make({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, bytes(8)),
        "no whole number",
    ),
    "shape of floats": (
        make({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8)),
        "no whole number",
    ),
    "negative offset": (make({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8)), "no whole number"),
    "shape and bytes differ": (make({"a": {**F32, "data_offsets": [0, 4]}}, bytes(4)), "needs 8"),
    "shape too large": (
        make({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8)),
        "needs",
    ),
    "overlap": (
        make({"a": AT_0, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        "'b' overlaps another",
    ),
    "gap": (
        make({"a": AT_0, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
        "'b' has a gap before it",
    ),
    "truncated": (make({"a": AT_0}, bytes(5)), "last 3 bytes are missing"),
    "padded": (make({"a": AT_0}, bytes(11)), "3 bytes follow"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "is a pickle, whatever its name says"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_unsound_files_get_a_sentence(tmp_path, case):
    content, sentence = WRONG[case]
    with pytest.raises(UserError, match=sentence) as caught:
        gate.check_tensors(write(tmp_path, content))
    assert "x.safetensors" in str(caught.value)


def test_a_checkpoint_of_torch_is_a_pickle_by_any_name(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is a pickle"):
        gate.read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"There is no file .*gone\.safetensors"):
        gate.read_tensors(tmp_path / "gone.safetensors")


SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_damage_slips_through(tmp_path_factory, data):
    """Cut, lengthen or change a sound file: it is refused, or safetensors reads the same."""
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["cut", "grow", "change", "insert"]))
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "cut":
            del content[at:]
        elif kind == "grow":
            content += data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=3))
        elif content:
            content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("gate") / "x.safetensors"
    path.write_bytes(content)
    try:
        infos = gate.check_tensors(path)
    except UserError:
        return
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(infos)
        for name, info in infos.items():
            tensor = theirs.get_tensor(name)
            assert tuple(tensor.shape) == info.shape and tensor.isfinite().all()


def test_truncation_at_every_byte_is_refused(tmp_path):
    for length in range(len(SOUND)):
        with pytest.raises(UserError):
            gate.check_tensors(write(tmp_path, SOUND[:length]))


def test_a_changed_file_is_found_by_its_hash(local, bricks):
    card = bricks.add(local)
    folder = local.folder(card)
    gate.check_artifact(card, folder)
    path = folder / "brick.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"brick\.safetensors has changed since sst2@"):
        gate.check_artifact(card, folder)
    assert [problem.ref for problem in local.verify()] == [card.ref]
    path.unlink()
    with pytest.raises(UserError, match="lacks its file"):
        gate.check_artifact(card, folder)


def test_an_edited_card_is_found_by_verify(local, bricks):
    card = bricks.add(local, interface={"alpha": 16})
    path = local.folder(card) / "brick.json"
    path.write_text(path.read_text().replace('"alpha": 16', '"alpha": 17'))
    (problem,) = local.verify()
    assert "its card was edited" in problem.sentence
    path.write_text("{")
    (problem,) = local.verify()
    assert "is not a card" in problem.sentence
    local.remove(card.ref)
    assert local.verify() == []


def test_a_foreign_file_is_found_by_verify(local, bricks):
    card = bricks.add(local)
    (local.folder(card) / "extra.py").write_text("print()")
    (problem,) = local.verify("sst2")
    assert "holds 'extra.py', which the card does not name" in problem.sentence


def test_a_brick_of_another_backbone(local, bricks):
    card = bricks.add(local, requires=["a" * 64], backbone_id="minilm")
    gate.require_backbone(card, "a" * 64, "minilm")
    with pytest.raises(UserError) as caught:
        gate.require_backbone(card, "b" * 64, "tiny")
    sentence = str(caught.value)
    assert all(part in sentence for part in (card.ref, "'minilm'", "a" * 12, "'tiny'", "b" * 12))
    gate.require_backbone(bricks.add(local, 1), "b" * 64)


def test_what_is_needed_beside_the_backbone_is_no_backbone(local, bricks):
    """The sentence encoder of a brick of facts stands in `requires` too."""
    card = bricks.add(local, requires=["a" * 64, "c" * 64], backbone_id="lm")
    gate.require_backbone(card, "a" * 64)
    with pytest.raises(UserError, match=f"'lm' .fingerprint {'a' * 12}. and does not fit"):
        gate.require_backbone(card, "c" * 64, "minilm")
