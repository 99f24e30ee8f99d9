"""Every metric by value against torchmetrics, SciPy, scikit-learn, or a naive loop."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchmetrics.functional.text import rouge_score, squad

from cfm_train.data.tasks import METRICS
from cfm_train.evaluation.metrics import score
from cfm_train.evaluation.spans import entity_spans
from cfm_train.evaluation.text import exact_match, rouge_l, token_f1

few = settings(max_examples=60, deadline=None)
ids = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


def value(scores: dict, name: str) -> float:
    return scores[name].value


def test_every_task_type_returns_its_metrics_with_finite_ordered_intervals() -> None:
    generator = np.random.default_rng(0)
    n = 50
    classes = generator.integers(0, 3, (2, n))
    sides = {
        "classification": classes,
        "multilabel": generator.integers(0, 2, (2, n, 4)),
        "regression": generator.normal(size=(2, n)),
        "token": generator.integers(0, 3, (2, n, 6)),
        "causal": (generator.gamma(9.0, size=n), generator.integers(1, 9, n)),
        "instruct": (generator.gamma(9.0, size=n), generator.integers(1, 9, n)),
        "seq2seq": ([f"a{i} cat" for i in range(n)], [f"a{i % 7} cat" for i in range(n)]),
    }
    assert set(sides) == set(METRICS)
    for task_type, (predictions, references) in sides.items():
        labels = ("O", "B-X", "I-X") if task_type == "token" else None
        scores = score(task_type, predictions, references, labels=labels)
        assert set(scores) == set(METRICS[task_type])
        for name, figure in scores.items():
            assert np.isfinite([figure.low, figure.value, figure.high]).all(), name
            assert figure.low < figure.value < figure.high, name
            assert figure.n == n


@few
@given(ids)
def test_classification_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    wanted, predicted = np.array(pairs).T
    scores = score("classification", predicted, wanted, bootstrap=0)
    assert value(scores, "accuracy") == pytest.approx(sk.accuracy_score(wanted, predicted))
    macro = sk.f1_score(wanted, predicted, average="macro", zero_division=0)
    assert value(scores, "macro_f1") == pytest.approx(macro)
    if len(set(wanted)) > 1 or len(set(predicted)) > 1:  # scikit-learn divides 0 by 0 otherwise
        expected = sk.matthews_corrcoef(wanted, predicted)
        assert value(scores, "mcc") == pytest.approx(expected, abs=1e-12)
    else:
        assert value(scores, "mcc") == 0.0


def test_classification_equals_torchmetrics_and_takes_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 7, generator=generator)
    wanted = torch.randint(0, 7, (300,), generator=generator)
    scores = score("classification", logits.numpy(), wanted.numpy(), labels=list("abcdefg"))
    kind = {"task": "multiclass", "num_classes": 7}
    accuracy = tm.accuracy(logits, wanted, average="micro", **kind)
    assert value(scores, "accuracy") == pytest.approx(float(accuracy))
    macro = tm.f1_score(logits, wanted, average="macro", **kind)
    assert value(scores, "macro_f1") == pytest.approx(float(macro))
    mcc = tm.matthews_corrcoef(logits, wanted, **kind)
    assert value(scores, "mcc") == pytest.approx(float(mcc), abs=1e-6)


@few
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**16))
def test_multilabel_equals_scikit_learn_on_the_labels_that_occur(n: int, k: int, seed: int) -> None:
    predicted, wanted = np.random.default_rng(seed).integers(0, 2, (2, n, k))
    scores = score("multilabel", predicted, wanted, bootstrap=0)
    occurs = (predicted + wanted).any(0)
    macro = micro = 0.0
    if occurs.any():
        p, w = predicted[:, occurs], wanted[:, occurs]
        # One column is a binary problem for scikit-learn, so the classes' scores are averaged here.
        macro = np.mean([sk.f1_score(w[:, i], p[:, i], zero_division=0) for i in range(p.shape[1])])
        micro = sk.f1_score(w.ravel(), p.ravel(), zero_division=0)
    assert value(scores, "macro_f1") == pytest.approx(macro)
    assert value(scores, "micro_f1") == pytest.approx(micro)
    assert value(scores, "exact") == pytest.approx(sk.accuracy_score(wanted, predicted))


def test_multilabel_equals_torchmetrics() -> None:
    predicted, wanted = np.random.default_rng(1).integers(0, 2, (2, 200, 9))
    scores = score("multilabel", predicted, wanted, bootstrap=0)
    sides = (torch.tensor(predicted), torch.tensor(wanted))
    for average in ("micro", "macro"):
        f1 = tm.f1_score(*sides, task="multilabel", num_labels=9, average=average)
        assert value(scores, f"{average}_f1") == pytest.approx(float(f1), abs=1e-6)


@few
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=40))
def test_regression_equals_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=np.float64).T
    scores = score("regression", x, y, bootstrap=0)
    assert value(scores, "rmse") == pytest.approx(sk.root_mean_squared_error(y, x))
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert value(scores, "pearson") == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
        assert value(scores, "spearman") == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    else:
        assert value(scores, "pearson") == value(scores, "spearman") == 0.0


@pytest.mark.parametrize(("shift", "scale"), [(1e9, 1.0), (0.0, 1e-12), (-5e6, 1e8)])
def test_correlation_keeps_its_digits_far_from_zero(shift: float, scale: float) -> None:
    x, noise = np.random.default_rng(2).normal(size=(2, 100))
    scores = score("regression", shift + scale * x, x + noise, bootstrap=0)
    expected = np.corrcoef((shift + scale * x) - shift, x + noise)[0, 1]
    assert value(scores, "pearson") == pytest.approx(expected, abs=1e-7)


def test_language_model_loss_is_per_token_not_per_row() -> None:
    nats, tokens = np.array([4.0, 9.0, 0.0]), np.array([2, 3, 0])
    scores = score("causal", nats, tokens)
    assert value(scores, "loss") == pytest.approx(13 / 5)
    assert value(scores, "perplexity") == pytest.approx(np.exp(13 / 5))
    assert scores["loss"].n == 2  # a row without a predicted token is no example
    assert scores["perplexity"].low == pytest.approx(np.exp(scores["loss"].low))


def test_perplexity_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 12, 30, generator=generator)
    wanted = torch.randint(0, 30, (8, 12), generator=generator)
    wanted[:, 9:] = torch.where(torch.rand(8, 3, generator=generator) < 0.5, -100, wanted[:, 9:])
    nats = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), wanted, reduction="none", ignore_index=-100
    ).sum(-1)
    scores = score("instruct", nats.numpy(), (wanted != -100).sum(-1).numpy(), bootstrap=0)
    expected = tm.text.perplexity(logits, wanted, ignore_index=-100)
    assert value(scores, "perplexity") == pytest.approx(float(expected), rel=1e-5)


BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def conlleval_spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """Spans by the start and end rules of the conlleval script, token pair by token pair."""

    def parts(at: int) -> tuple[str, str]:
        tag = tags[at] if 0 <= at < len(tags) else "O"
        return (tag[0], tag[2:]) if tag != "O" else ("O", "")

    def starts(at: int) -> bool:
        (before, kind_before), (here, kind) = parts(at - 1), parts(at)
        return here == "B" or (here == "I" and (before == "O" or kind != kind_before))

    def ends(at: int) -> bool:
        (here, kind), (after, kind_after) = parts(at), parts(at + 1)
        return here != "O" and (after in "OB" or kind != kind_after)

    spans = set()
    for start in range(len(tags)):
        if starts(start):
            end = next(at for at in range(start, len(tags)) if ends(at))
            spans.add((start, end + 1, parts(start)[1]))
    return spans


@few
@given(st.lists(st.sampled_from(BIO), max_size=12))
def test_entity_spans_are_those_of_conlleval(tags: list[str]) -> None:
    assert set(entity_spans(tags)) == conlleval_spans(tags)


@few
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_token_scores_equal_a_naive_loop(rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 8, rows)
    predicted = [generator.integers(0, 5, length) for length in lengths]
    wanted = [generator.integers(0, 5, length) for length in lengths]
    padded = [np.append(row, [-100, -100]) for row in wanted]  # sub-words and padding
    longer = [np.append(row, [1, 2]) for row in predicted]
    scores = score("token", longer, padded, labels=BIO, bootstrap=0)
    hits = tokens = found = said = right = 0
    for p, w in zip(predicted, wanted, strict=True):
        a, b = (conlleval_spans([BIO[i] for i in side]) for side in (p, w))
        found, said, right = found + len(a & b), said + len(a), right + len(b)
        hits, tokens = hits + int((p == w).sum()), tokens + len(w)
    assert value(scores, "token_accuracy") == pytest.approx(hits / tokens)
    precision, recall = found / said if said else 0.0, found / right if right else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert value(scores, "entity_f1") == pytest.approx(f1)


def test_part_of_speech_tags_have_no_entities() -> None:
    scores = score("token", [[0, 1]], [[0, 1]], labels=("NOUN", "VERB"))
    assert set(scores) == {"token_accuracy"}


words = st.lists(
    st.sampled_from(["the", "cat", "sat,", "on", "a", "Mat.", "42", "an", "dog's"]), max_size=9
)


@few
@given(words, words)
def test_texts_equal_torchmetrics(a: list[str], b: list[str]) -> None:
    said, right = " ".join(a), " ".join(b)
    rouge = rouge_score(said, right, rouge_keys="rougeL")["rougeL_fmeasure"]
    assert rouge_l(said, right) == pytest.approx(float(rouge), abs=1e-6)
    prediction = [{"prediction_text": said, "id": "0"}]
    reference = [{"answers": {"answer_start": [0], "text": [right]}, "id": "0"}]
    expected = float(squad(prediction, reference)["f1"]) / 100
    assert token_f1(said, right) == pytest.approx(expected, abs=1e-6)


def test_texts_in_other_scripts_are_scored() -> None:
    assert rouge_l("Привет мир", "привет, мир") == 1.0
    assert exact_match("caf\u00e9  noir\n", "cafe\u0301 noir") == 1.0
    assert exact_match("1.5", "15") == 0.0
    assert token_f1("", "the") == 1.0  # no words left on either side
    assert token_f1("", "cat") == rouge_l("", "cat") == rouge_l("", "") == 0.0
    scores = score("seq2seq", ["a b", "c"], ["a b", "d"], bootstrap=0)
    assert [value(scores, name) for name in ("exact_match", "rouge_l")] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("task_type", "predictions", "references", "expected"),
    [
        ("classification", [1], [1], {"accuracy": 1.0, "macro_f1": 1.0, "mcc": 0.0}),
        ("classification", [0, 0, 0], [0, 1, 1], {"accuracy": 1 / 3, "mcc": 0.0}),
        ("classification", [2, 2], [2, 2], {"accuracy": 1.0, "macro_f1": 1.0, "mcc": 0.0}),
        ("multilabel", [[0, 0]], [[0, 0]], {"micro_f1": 0.0, "macro_f1": 0.0, "exact": 1.0}),
        ("regression", [1.0], [3.0], {"pearson": 0.0, "spearman": 0.0, "rmse": 2.0}),
        ("regression", [0.3, 0.3, 0.3], [1, 2, 3], {"pearson": 0.0, "spearman": 0.0}),
        ("causal", [9e9], [1], {"loss": 9e9, "perplexity": np.exp(700)}),
    ],
)
def test_degenerate_cases_are_defined(
    task_type: str, predictions: list, references: list, expected: dict[str, float]
) -> None:
    scores = score(task_type, predictions, references)
    for name, figure in scores.items():
        assert np.isfinite([figure.low, figure.value, figure.high]).all()
        if len(references) == 1:
            assert figure.low == figure.value == figure.high, name
    for name, wanted in expected.items():
        assert value(scores, name) == pytest.approx(wanted), name


@pytest.mark.parametrize(
    ("task_type", "predictions", "references", "labels", "sentence"),
    [
        ("clasification", [0], [0], None, "no task type"),
        ("classification", [], [], None, "one at least"),
        ("classification", [0, 1], [0], None, "got 2 and 1"),
        ("classification", [0, 2], [0, 1], ("a", "b"), "from 0 to 2; valid are 0 to 1"),
        ("classification", [0, 1], [0, -1], None, "from -1 to 0; valid are 0 or more"),
        ("classification", [0.5, 1.0], [0, 1], None, "class ids are integers"),
        ("classification", [[0.5, np.nan]], [0], None, "NaN"),
        ("multilabel", [[0.3, 1.0]], [[0, 1]], None, "threshold"),
        ("multilabel", [[0, 1]], [[0, 1]], ("a",), "2 columns for 1 labels"),
        ("multilabel", [[0, 1]], [[0]], None, "on both sides"),
        ("regression", [np.nan], [1.0], None, "NaN"),
        ("token", [[0, 1]], [[0]], None, "row 0 has 2 predictions for 1 tokens"),
        ("token", [[0]], [[-100]], None, "no row has a scored token"),
        ("causal", [1.0], [0], None, "no row has a predicted token"),
    ],
)
def test_wrong_input_is_named(
    task_type: str, predictions: list, references: list, labels: tuple | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        score(task_type, predictions, references, labels=labels)
