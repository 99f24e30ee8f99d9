"""The README of an artifact is a model card that the Hub's own code reads."""

from __future__ import annotations

from huggingface_hub import ModelCard

from cfm_train.library import model_card
from cfm_train.library.card import Card

SCORE = {"value": 0.8612, "low": 0.8401, "high": 0.8799, "n": 872}


def card(**known: object) -> Card:
    fields = {
        "name": "sst2",
        "kind": "lora",
        "version": "0123456789ab",
        "backbone_id": "sentence-transformers/all-MiniLM-L6-v2",
        "requires": ["f" * 64],
        "operation": "train",
        "created": "2026-01-02T03:04:05.000000+00:00",
        "heads": {"sst2": {"task": "classification", "labels": ["negative", "a|b"], "size": 2}},
        "metrics": {"validation/accuracy": {"value": 0.9}, "test/accuracy": SCORE},
        "data": [{"name": "sst2", "fingerprint": "d" * 64, "licence": "cc0-1.0"}],
        "parents": [{"name": "old", "version": "a" * 12}],
        "licence": "mit",
    }
    return Card(**{**fields, **known})  # type: ignore[arg-type]


def test_the_hub_reads_the_front_matter():
    data = ModelCard(model_card.write(card(), ["adapter_config.json"])).data
    assert data.library_name == "peft"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.license == "mit"
    assert set(data.tags) >= {"cfm_train", "lora"}
    assert data.pipeline_tag == "text-classification"
    results = {result.metric_name: result for result in data.eval_results}
    assert results["test/accuracy"].metric_value == SCORE["value"]
    assert results["test/accuracy"].metric_type == "accuracy"
    assert results["test/accuracy"].dataset_name == "sst2"
    assert data.model_name == "sst2"


def test_the_text_says_how_to_load_it_and_what_it_is():
    text = model_card.write(card(), ["adapter_config.json"])
    assert 'cfm_train.load("sentence-transformers/all-MiniLM-L6-v2", "sst2@0123456789ab")' in text
    assert "PeftModel.from_pretrained" in text
    assert "| test/accuracy | 0.8612 | 0.8401 to 0.8799 | 872 |" in text
    assert "| sst2 | classification | negative, a\\|b |" in text
    assert "| sst2 | dddddddddddd | cc0-1.0 |" in text
    assert "| old | aaaaaaaaaaaa |" in text
    assert "fingerprint `ffffffffffff`" in text


def test_what_is_unknown_is_left_out():
    bare = Card(name="x", kind="prefix", version="0" * 12, created="2026-01-01T00:00:00+00:00")
    text = model_card.write(bare, ["brick.safetensors"])
    data = ModelCard(text).data
    assert data.library_name == "cfm_train" and data.base_model is None and data.license is None
    assert "PeftModel" not in text and "## Metrics" not in text and "## Data" not in text


def test_a_folder_is_no_base_model():
    """The Hub refuses a base_model that is a path of somebody's disk."""
    for path in ("/data/models/x", "./x", "~/x", "a/b/c", "C:\\x"):
        text = model_card.write(card(backbone_id=path), [])
        assert ModelCard(text).data.base_model is None


def test_yaml_cannot_be_broken_by_a_name():
    odd = card(heads={"a: b\n---": {"task": "classification", "labels": ["'", '"', "#"]}}, data=[])
    assert ModelCard(model_card.write(odd, [])).data.eval_results[0].dataset_name == "a: b\n---"


def test_main_metric_is_the_first_on_test():
    assert model_card.main_metric(card()) == ("test/accuracy", SCORE)
    assert model_card.main_metric(card(metrics={"validation/f1": 0.5, "note": "text"})) == (
        "validation/f1",
        {"value": 0.5},
    )
    assert model_card.main_metric(card(metrics={})) is None
