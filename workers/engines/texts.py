"""Texts to build engines from, and other texts to judge them by."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final

__all__ = ["TEXTS_VERSION", "calibration_texts", "held_out_texts", "timing_texts"]

#: Bump when the texts change: engines built from others are built again.
TEXTS_VERSION: Final = "1"


@cache
def _sentences() -> tuple[str, ...]:
    """A few hundred true sentences on many topics."""
    text = resources.files("cortex_tasks").joinpath("demo_data", "sentences.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def _with_paragraphs(sentences: tuple[str, ...]) -> list[str]:
    """The sentences, and paragraphs of five to twenty of them (about 70 to 270 tokens)."""
    paragraphs = [
        " ".join(sentences[start : start + size]) for size in (5, 10, 20) for start in range(0, len(sentences), size)
    ]
    return [*sentences, *paragraphs]


def calibration_texts() -> list[str]:
    return _with_paragraphs(_sentences()[::2])


def held_out_texts() -> list[str]:
    """None of them shares a sentence with the calibration texts."""
    return _with_paragraphs(_sentences()[1::2])


def timing_texts() -> list[str]:
    """A short sample of mixed lengths."""
    return held_out_texts()[::5]
