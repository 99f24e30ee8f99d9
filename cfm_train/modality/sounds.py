"""Sounds from bytes: WAV files of 8, 16 or 32 bits, mixed to one channel, at any rate asked for."""

from __future__ import annotations

import io
import wave

import numpy as np

from cfm_train.errors import UserError

#: Bytes of a sample -> its dtype, what silence is, and the largest value.
_SAMPLES = {1: (np.uint8, 128, 128.0), 2: (np.int16, 0, 32768.0), 4: (np.int32, 0, 2.0**31)}


def read_sound(content: bytes, rate: int, at: str) -> np.ndarray:
    """A sound as float32 ``[samples]`` between -1 and 1.

    Args:
        content: a WAV file's bytes.
        rate: samples per second that are wanted.
        at: where it stands, for the error sentence.

    Raises:
        UserError: it is no WAV file of whole numbers, or it is empty.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            own, channels = file.getframerate(), file.getnchannels()
            dtype, zero, most = _SAMPLES[file.getsampwidth()]
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype).reshape(-1, channels)
    except (wave.Error, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{at}: is no WAV file of 8, 16 or 32 bits ({error}); convert it to one."
        ) from None
    if not len(raw):
        raise UserError(f"{at}: the sound is empty.")
    samples = (raw.astype(np.float64) - zero).mean(axis=1) / most
    return resample(samples, own, rate).astype(np.float32)


def resample(samples: np.ndarray, own: int, rate: int) -> np.ndarray:
    """Another rate by the Fourier transform: frequencies that both rates have stay as they are.

    Args:
        samples: float64 ``[samples]``.
        own: its rate.
        rate: the rate wanted.
    """
    if own == rate:
        return samples
    count = max(1, round(len(samples) * rate / own))
    spectrum = np.fft.rfft(samples)
    kept = min(len(spectrum), count // 2 + 1)
    other = np.zeros(count // 2 + 1, complex)
    other[:kept] = spectrum[:kept]
    return np.fft.irfft(other, count) * (count / len(samples))
