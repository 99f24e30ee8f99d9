"""Token numbers against the tokenizer called row by row, and the cache that keeps them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfm_train.data.encode import Encoded, encode, encode_rows, tokenizer_fingerprint
from cfm_train.data.packing import pack
from cfm_train.data.sources import check
from cfm_train.data.tagging import from_spans, from_tokens
from cfm_train.data.tasks import IGNORED, TaskSpec

LIMITS = {"max_length": 24, "target_max_length": 6, "pack": True}
TEXTS = ["a short one", "a long one " * 12, "The naïve café, 漢字!", "x"]


def spec(
    kind: str, labels: tuple[str, ...] | None = ("a", "b", "c"), pair: bool = False
) -> TaskSpec:
    columns = ("text_a", "text_b") if pair else ("text",)
    return TaskSpec("mine", kind, labels, "accuracy", True, columns)


def rows_of(texts: list[Any], **keys: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for i, text in enumerate(texts):
        extra = {key: values[i] for key, values in keys.items()}
        rows.append({"text": text if isinstance(text, list) else [text], "_at": f"f:{i}", **extra})
    return rows


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("pair", [False, True])
def test_texts_are_those_of_the_tokenizer(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, pair: bool
) -> None:
    tokenizer = request.getfixturevalue(name)
    texts: list[Any] = [[a, b] for a in TEXTS for b in TEXTS] if pair else TEXTS
    rows = rows_of(texts, label=[i % 3 for i in range(len(texts))])
    data = encode_rows(rows, spec("classification", pair=pair), LIMITS, tokenizer, tmp_path)
    cut = 0
    for i, row in enumerate(rows):
        alone = tokenizer(*row["text"], truncation=True, max_length=24)
        assert data.slice("input_ids", i).tolist() == alone["input_ids"]
        assert ("token_type_ids" in data.arrays) == (pair and name == "bert")
        if "token_type_ids" in data.arrays:
            assert data.slice("token_type_ids", i).tolist() == alone["token_type_ids"]
        cut += len(tokenizer(*row["text"])["input_ids"]) > 24
    assert data.truncated == cut > 0
    assert data.lengths.tolist() == [len(data.slice("input_ids", i)) for i in range(len(rows))]
    assert data.arrays["labels"].tolist() == [row["label"] for row in rows]
    assert data.row(2) is rows[2]


def test_the_model_may_take_less_than_the_section_asks(llama: Any, tmp_path: Path) -> None:
    rows = rows_of(["word " * 1000], label=[0])
    data = encode_rows(
        rows, spec("classification"), {**LIMITS, "max_length": 9999}, llama, tmp_path
    )
    assert data.max_length == llama.model_max_length == data.lengths[0] == 256
    assert data.truncated == 1


def test_answers_of_each_kind(bert: Any, tmp_path: Path) -> None:
    many = encode_rows(
        rows_of(TEXTS, label=[[0, 2], [], [1], [2]]), spec("multilabel"), LIMITS, bert, tmp_path
    )
    assert many.arrays["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert many.arrays["labels"].dtype == np.float32
    score = encode_rows(
        rows_of(TEXTS, label=[0.5, -1.0, 3.0, 0.0]),
        spec("regression", None),
        LIMITS,
        bert,
        tmp_path,
    )
    assert score.arrays["labels"].tolist() == [0.5, -1.0, 3.0, 0.0]
    none = encode_rows(rows_of(TEXTS), spec("classification"), LIMITS, bert, tmp_path)
    assert "labels" not in none.arrays


SENTENCES = [
    (["Unbelievably", "Ada", "met", "Babbage", "."], [0, 1, 0, 2, 0]),
    (["electroencephalography"] * 12, list(range(12))),
    (["\u200b", "seen"], [1, 2]),
]


def test_the_first_sub_word_carries_the_tag(bert: Any, tmp_path: Path) -> None:
    """Against ``word_ids`` of the tokenizer called with pre-split words."""
    rows = [{**from_tokens(list(t), None), "label": tags, "_at": "f:1"} for t, tags in SENTENCES]
    data = encode_rows(rows, spec("token", tuple(map(str, range(12)))), LIMITS, bert, tmp_path)
    for i, (tokens, tags) in enumerate(SENTENCES):
        oracle = bert(tokens, is_split_into_words=True, truncation=True, max_length=24)
        ids, labels = data.slice("input_ids", i), data.slice("token_labels", i)
        assert ids.tolist() == oracle["input_ids"]
        seen: set[int] = set()
        expected = []
        for word in oracle.word_ids():
            expected.append(IGNORED if word is None or word in seen else tags[word])
            seen |= set() if word is None else {word}
        assert labels.tolist() == expected
        firsts = data.slice("first_tokens", i)
        assert len(firsts) == len(tokens)
        assert [labels[f] for f in firsts if f >= 0] == [t for w, t in enumerate(tags) if w in seen]
    assert data.truncated == 1


def test_spans_and_sub_words_of_a_sentencepiece_model(llama: Any, tmp_path: Path) -> None:
    row = {**from_spans("Lily saw Tom's dog, Max.", [[0, 4, "PER"], [20, 23, "DOG"]]), "_at": "f:1"}
    names = ["O", "B-PER", "I-PER", "B-DOG", "I-DOG"]
    row["label"] = [names.index(tag) for tag in row["label"]]
    data = encode_rows([row], spec("token", tuple(names)), LIMITS, llama, tmp_path)
    ids, labels = data.slice("input_ids", 0), data.slice("token_labels", 0)
    for word, first, tag in zip(
        row["tokens"], data.slice("first_tokens", 0), row["label"], strict=True
    ):
        assert word.startswith(llama.decode([ids[first]]).strip())
        assert labels[first] == tag
    assert (labels != IGNORED).sum() == len(row["tokens"])


def test_causal_predicts_every_token_but_the_first_once(llama: Any, tmp_path: Path) -> None:
    texts = ["Once upon a time. " * n for n in (1, 9, 2, 30, 1, 4)]
    for packed in (True, False):
        limits = {**LIMITS, "pack": packed}
        data = encode_rows(rows_of(texts), spec("causal", None), limits, llama, tmp_path)
        documents = [[*llama(text)["input_ids"], llama.eos_token_id] for text in texts]
        wanted = sorted(t for document in documents for t in document[1:])
        labels = np.concatenate([data.slice("token_labels", i) for i in range(len(data))])
        assert sorted(labels[labels != IGNORED].tolist()) == wanted
        assert data.lengths.max() <= 24
        for i in range(len(data)):
            ids, marks = data.slice("input_ids", i), data.slice("token_labels", i)
            starts = np.flatnonzero(data.slice("position_ids", i) == 0) if packed else np.array([0])
            held = np.split(ids, starts[1:])
            owners = data.slice("block_rows", i)
            assert len(held) == len(owners)
            for piece, owner in zip(held, owners, strict=True):
                assert (
                    f" {' '.join(map(str, piece))} " in f" {' '.join(map(str, documents[owner]))} "
                )
            assert (marks[starts] == IGNORED).all()
            rest = np.setdiff1d(np.arange(len(ids)), starts)
            assert (marks[rest] == ids[rest]).all()
            assert data.row(i)["text"] == [texts[o] for o in owners]
        if not packed:
            assert "position_ids" not in data.arrays


def test_texts_to_continue_keep_their_ends(llama: Any, tmp_path: Path) -> None:
    texts = ["Once upon", "a time " * 40]
    rows = [{**row, "prompt": True} for row in rows_of(texts)]
    data = encode_rows(rows, spec("causal", None), LIMITS, llama, tmp_path)
    for i, text in enumerate(texts):
        assert data.slice("input_ids", i).tolist() == llama(text)["input_ids"][-24:]
        assert data.row(i) is rows[i]
    assert data.arrays["answer_starts"].tolist() == data.lengths.tolist()
    assert data.truncated == 1


def test_packing_fills_blocks(shared: Path, llama: Any, tmp_path: Path) -> None:
    from cfm_train.data.files import read_file

    path = shared / "data" / "corpora" / "shakespeare.valid.txt"
    raws = read_file(path, key="data.train")
    rows = rows_of([raw.values["text"] for raw in raws if raw.values])
    data = encode_rows(rows, spec("causal", None), {**LIMITS, "max_length": 256}, llama, tmp_path)
    assert data.lengths.sum() / (len(data) * 256) > 0.97


def test_pack_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 17, size=rng.integers(0, 60)).tolist()
        blocks = pack(sizes, 16)
        assert sorted(i for block in blocks for i in block) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in block) <= 16 for block in blocks)
        # Best fit in a plain loop over every block.
        free: list[int] = []
        for size in sorted(sizes, reverse=True):
            fitting = [left for left in free if left >= size]
            if fitting:
                free[free.index(min(fitting))] -= size
            else:
                free.append(16 - size)
        assert len(blocks) == len(free)


def test_sequence_to_sequence(tmp_path: Path) -> None:
    tokenizer = t5_like()
    rows = rows_of(["translate: a b c", "long " * 40], target=["c b a", "x " * 20])
    data = encode_rows(rows, spec("seq2seq", None), LIMITS, tokenizer, tmp_path)
    for i, row in enumerate(rows):
        source = tokenizer(row["text"][0], truncation=True, max_length=24)["input_ids"]
        target = tokenizer(text_target=row["target"], truncation=True, max_length=6)["input_ids"]
        assert data.slice("input_ids", i).tolist() == source
        assert data.slice("target_ids", i).tolist() == target
        assert data.lengths[i].tolist() == [len(source), len(target)]
        assert target[-1] == tokenizer.eos_token_id
    assert data.truncated == 1  # cut on both sides, counted once


def t5_like() -> Any:
    """A word tokenizer that closes every text with ``</s>``, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "translate:", "a", "b", "c", "long", "x"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def entries(cache: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in (cache / "encoded").iterdir()}


def same(a: Encoded, b: Encoded) -> bool:
    return a.arrays.keys() == b.arrays.keys() and all(
        np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays
    )


def test_tokenised_once(bert: Any, tmp_path: Path) -> None:
    rows = rows_of(TEXTS, label=[0, 1, 2, 0])
    first = encode_rows(rows, spec("classification"), LIMITS, bert, tmp_path)
    before = entries(tmp_path)
    bert(["another call that leaves padding behind"], padding="max_length", max_length=30)
    moved = [{**row, "_at": "elsewhere:1"} for row in rows]
    again = encode_rows(moved, spec("classification"), LIMITS, bert, tmp_path)
    assert entries(tmp_path) == before and len(before) == 1
    assert same(first, again) and again.truncated == first.truncated
    assert isinstance(again.arrays["input_ids"], np.memmap)
    for changed in (
        {"rows": rows[1:]},
        {"spec": spec("classification", ("a", "b", "d"))},
        {"section": {**LIMITS, "max_length": 23}},
    ):
        keys = {"rows": rows, "spec": spec("classification"), "section": LIMITS} | changed
        encode_rows(**keys, tokenizer=bert, cache=tmp_path)
    assert len(entries(tmp_path)) == 4


def test_tokenizers_are_told_apart(bert: Any, llama: Any) -> None:
    assert tokenizer_fingerprint(bert) == tokenizer_fingerprint(bert)
    prints = {tokenizer_fingerprint(bert), tokenizer_fingerprint(llama)}
    llama.chat_template = "{{ messages }}"
    prints.add(tokenizer_fingerprint(llama))
    llama.chat_template = None
    assert len(prints) == 3


@pytest.mark.parametrize("damage", ["cut", "gone", "meta"])
def test_a_damaged_entry_is_made_again(bert: Any, tmp_path: Path, damage: str) -> None:
    rows = rows_of(TEXTS, label=[0, 1, 2, 0])
    whole = encode_rows(rows, spec("classification"), LIMITS, bert, tmp_path)
    copy = {name: np.array(array) for name, array in whole.arrays.items()}
    (entry,) = (tmp_path / "encoded").iterdir()
    if damage == "cut":
        (entry / "input_ids.npy").write_bytes((entry / "input_ids.npy").read_bytes()[:-8])
    elif damage == "gone":
        (entry / "offsets.npy").unlink()
    else:
        (entry / "meta.json").write_text(json.dumps({"arrays": {"input_ids": [3]}, "truncated": 0}))
    again = encode_rows(rows, spec("classification"), LIMITS, bert, tmp_path)
    assert all(np.array_equal(again.arrays[name], array) for name, array in copy.items())
    assert len(list((tmp_path / "encoded").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_no_run(bert: Any, tmp_path: Path) -> None:
    (tmp_path / "encoded").write_text("a file where the folder should be")
    data = encode_rows(
        rows_of(TEXTS, label=[0, 1, 2, 0]), spec("classification"), LIMITS, bert, tmp_path
    )
    assert len(data) == 4


WORKER = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from cfm_train.config.compose import option
from cfm_train.data.encode import encode
from cfm_train.data.sources import check
folder, root, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
print("ready", flush=True)
sys.stdin.readline()
data = encode(check(option("data", "trec", root=root)), tokenizer, Path(cache))
print(int(data.train.arrays["input_ids"].sum()), len(data.test), flush=True)
"""


def test_two_processes_make_the_same_entry_at_once(shared: Path, bert: Any, tmp_path: Path) -> None:
    root = str(shared / "data" / "tasks")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, bert.name_or_path, root, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = {worker.communicate()[0] for worker in workers}
    assert len(results) == 1 and results.pop().strip()
    assert all(worker.returncode == 0 for worker in workers)
    assert len(entries(tmp_path)) == 3  # nothing half made is left behind
    shutil.rmtree(tmp_path)


def test_a_whole_task(
    section: Callable[..., dict[str, Any]], write: Callable[..., str], bert: Any, tmp_path: Path
) -> None:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(20)]
    checked = check(section(train=write("a.jsonl", rows), validation_fraction=0.0))
    data = encode(checked, bert, tmp_path)
    assert (len(data.train), data.validation, data.test) == (20, None, None)
    assert data.train.row(3)["_at"].endswith("a.jsonl:4")
