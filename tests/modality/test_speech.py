"""Sounds: another rate, and the speech embedding against the runner beside its weights."""

from __future__ import annotations

import importlib.util
import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from cfm_train.errors import UserError
from cfm_train.modality.finding import find_encoder
from cfm_train.modality.sounds import read_sound, resample


def wav(samples: np.ndarray, rate: int) -> bytes:
    """16-bit mono."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype(np.int16).tobytes())
    return out.getvalue()


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    """Two tones; whole periods, so that the Fourier transform has them exactly."""
    t = np.arange(round(rate * seconds)) / rate
    return 0.4 * np.sin(2 * np.pi * 440 * t) + 0.3 * np.sin(2 * np.pi * 1200 * t)


@pytest.mark.parametrize(("own", "rate"), [(8000, 16000), (16000, 8000), (44100, 16000)])
def test_a_tone_is_the_same_tone_at_another_rate(own: int, rate: int) -> None:
    np.testing.assert_allclose(resample(tone(own), own, rate), tone(rate), atol=1e-9)
    read = read_sound(wav(tone(own), own), rate, "here")
    np.testing.assert_allclose(read, tone(rate), atol=1e-3)


def test_the_speech_embedding_is_its_runners(shared: Path) -> None:
    folder = shared / "models" / "audio-speech-embedding"
    spec = importlib.util.spec_from_file_location("runner", folder / "speech_embedding.py")
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    theirs = runner.SpeechEmbedding(str(folder)).eval()
    section = {"kind": "speech", "path": str(folder), "least": 0.0, "hop": 8, "pool": "none"}
    ours = find_encoder(section).open()
    noise = np.random.default_rng(0).standard_normal(16000) * 0.05
    items = [ours.load(wav(s, 16000), "x") for s in (tone(16000) + noise, tone(16000, 0.4))]
    features, mask = ours.encode(items)
    assert ours.modality == "audio" and mask.sum(dim=1).tolist() == [3, 1]
    for item, found, there in zip(items, features, mask, strict=True):
        with torch.inference_mode():
            expected = theirs(item[None])[0]
        torch.testing.assert_close(found[there], expected, atol=1e-4, rtol=1e-5)
    short = wav(tone(16000, 0.4), 16000)
    silence = [torch.zeros(4800)] * 2
    padded = find_encoder({**section, "least": 1.0}).open().load(short, "x")
    torch.testing.assert_close(padded, torch.cat([silence[0], ours.load(short, "x"), silence[1]]))


@pytest.mark.parametrize("cut", [1, 43])
def test_a_wav_that_is_cut_off_within_a_sample_is_refused(cut: int) -> None:
    with pytest.raises(UserError, match=r"a\.wav: is no WAV file"):
        read_sound(wav(tone(8000), 8000)[:-cut], 16000, "a.wav")
