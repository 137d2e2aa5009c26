"""The demo's scenes: each runs real jobs on a model, shows the answers, and says what it expected of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from cortex_tasks.client import options as o
from cortex_tasks.demo import Stage
from cortex_tasks.demo.material import ANOMALIES, DAYS, HOLDOUT, sentences, visits
from cortex_tasks.errors import ModelUnavailable
from cortex_tasks.payloads import Result
from cortex_tasks.results import JobResult
from cortex_tasks.show import highlighted, show, timings_line
from cortex_tasks.terminal import Band, plot

__all__ = ["SCENES"]

#: A question, and words of the sentence that must be among the best three.
_QUESTIONS: Final = (
    ("Which animal is the quickest?", "cheetah"),
    ("Why does everything in the shop get more expensive?", "Inflation"),
    ("finding bugs in software early", "Unit tests"),
    ("How do plants use sunlight?", "Chlorophyll"),
)
_NEWS: Final = (
    "On 9 November 1989 the Berlin Wall was opened after 28 years.",
    "Marie Curie received the Nobel Prize in Stockholm in December 1911.",
    "The museum paid $4.5 million for the painting, 12% more than in 2019.",
)
#: Summer and Saturday take a share of the visits, not a number of them.
_MODE: Final[o.SeriesOptions] = {"seasonality_mode": "multiplicative"}


def semantic_search(stage: Stage) -> None:
    """Embed the collection as a stream, then find what answers a question in other words."""
    import numpy as np

    texts = sentences()
    stage.title(f"Semantic search: {len(texts)} sentences, minilm")
    began = time.monotonic()
    found = JobResult("embed", tuple(stage.cortex.map("embed", texts, progress=False))).values()
    took_s = time.monotonic() - began
    matrix = np.stack([embedding.vector for embedding in found])
    stage.note(f"{len(texts)} sentences embedded in {took_s:.2f} s: {len(texts) / took_s:,.0f} a second")
    for question, words in _QUESTIONS:
        embedding = stage.cortex.embed(question)
        scores = matrix @ embedding.vector
        best = np.argsort(-scores)[:3]
        stage.say("", stage.style(question, "cyan", "bold"))
        for at in best:
            stage.say(f"  {scores[at]:.3f}  {texts[at]}")
        stage.note(f"  {timings_line(embedding.timings)}")
        stage.expect(any(words in texts[at] for at in best), f"{words!r} is not among the best for {question!r}")


def entities(stage: Stage) -> None:
    """Names, places, dates and sums in running text."""
    stage.title("Entities in text: spacy")
    answer = stage.cortex.annotate(_NEWS)
    for text, document in zip(_NEWS, answer.values(), strict=True):
        stage.say(highlighted(text, document.entities, stage.style))
    stage.note(timings_line(answer.timings))
    spans = [(entity.text, text) for text, doc in zip(_NEWS, answer.values(), strict=True) for entity in doc.entities]
    stage.expect(any("1989" in span for span, _ in spans), "the date of the first sentence was not found")
    stage.expect(any("4.5" in span for span, _ in spans), "the sum of the third sentence was not found")
    stage.expect(all(span in text for span, text in spans), "an entity is not a part of its text")


def masks(stage: Stage) -> None:
    stage.title("Fill the mask: distilbert")
    text = "The capital of France is [MASK]."
    _where_available(stage, text, lambda: stage.cortex.fill_mask(text, top_k=3), _names("paris"))


def sentiment(stage: Stage) -> None:
    stage.title("Sentiment: sentiment")
    text = "The staff were kind and the soup was wonderful."
    _where_available(stage, text, lambda: stage.cortex.classify(text), _names("POSITIVE"))


def topics(stage: Stage) -> None:
    stage.title("Any labels, no training: mnli")
    text = "The striker scored twice in the last ten minutes."
    labels = ["sport", "cooking", "politics"]
    _where_available(stage, text, lambda: stage.cortex.zero_shot(text, labels), _names("sport"))


def _names(word: str) -> Callable[[Any], bool]:
    """Whether a word is the first label or the first candidate."""

    def check(answer: Any) -> bool:
        first = answer.label if hasattr(answer, "label") else answer.candidates[0].token
        return bool(first.strip().lower() == word.lower())

    return check


def _where_available(stage: Stage, text: str, ask: Callable[[], Result], right: Callable[[Any], bool]) -> None:
    """A machine that reaches no model hub has no DistilBERT: a reason and a remedy are the right answer then."""
    stage.say(text)
    try:
        answer = ask()
    except ModelUnavailable as error:
        stage.paragraph(f"unavailable: {error}", "yellow")
        stage.expect(len(str(error)) > 20, "an unavailable model must say why, and the remedy")
        return
    stage.say(*show(text, answer, stage.style))
    stage.expect(right(answer), f"an unlikely answer to {text!r}")


def forecast(stage: Stage) -> None:
    """Six weeks ahead, judged by what came."""
    data = visits()
    stage.title(f"Forecast: {DAYS} days of library visits, {HOLDOUT} days ahead, prophet")
    answer = stage.cortex.forecast(data.series(), horizon=HOLDOUT, interval_width=0.9, **_MODE)
    shown = 2 * HOLDOUT
    band = Band(answer.yhat, answer.yhat_lower, answer.yhat_upper)
    labels = (data.ds[-shown], data.ds[-1], answer.ds[-1][:10])
    stage.say(*plot(data.y[-shown:], band, labels, width=stage.width - 1, height=11, style=stage.style))
    inside = sum(a <= y <= b for y, a, b in zip(data.future, answer.yhat_lower, answer.yhat_upper, strict=True))
    error = sum(abs(y - f) / y for y, f in zip(data.future, answer.yhat, strict=True)) / HOLDOUT
    stage.say(f"What came was {error:.1%} off on average; {inside} of {HOLDOUT} days lay within the 90 % interval.")
    stage.note(timings_line(answer.timings))
    stage.expect(error < 0.08, f"the forecast is {error:.1%} off on average")
    stage.expect(inside >= 0.6 * HOLDOUT, f"only {inside} of {HOLDOUT} days lay within the interval")


def decomposition(stage: Stage) -> None:
    """Trend, week and year taken apart."""
    data = visits()
    stage.title("Decomposition: prophet")
    answer = stage.cortex.decompose(data.series(), **_MODE)
    stage.say(*show(data.series(), answer, stage.style))
    stage.expect(answer.trend[-1] > answer.trend[0], "the trend does not rise")
    weekly = answer.seasonalities.get("weekly", ())
    # The series starts on a Monday: the sixth day of a week is the quietest.
    quietest = min(range(7), key=lambda day: weekly[day]) if len(weekly) >= 7 else None
    stage.expect(quietest == 5, "Saturday is not the quietest day of the week")


def anomalies(stage: Stage) -> None:
    """Three days on which something happened, among three years of noise."""
    data = visits(with_anomalies=True)
    stage.title("Anomalies: prophet")
    answer = stage.cortex.detect_anomalies(data.series(), interval_width=0.995, **_MODE)
    found = {point.ds[:10] for point in answer.points}
    expected = {data.ds[day] for day in ANOMALIES}
    stage.say(
        *plot(
            data.y,
            Band((), (), ()),
            (data.ds[0], "", data.ds[-1]),
            width=stage.width - 1,
            height=7,
            style=stage.style,
            marks=[data.ds.index(day) for day in sorted(found)],
        )
    )
    strongest = answer.model_copy(update={"points": _strongest(answer.points, 5)})
    stage.say(*show(data.series(), strongest, stage.style))
    stage.expect(expected <= found, f"missed: {', '.join(sorted(expected - found))}")
    stage.expect(len(found) <= 0.02 * DAYS, f"{len(found)} of {DAYS} days were called anomalies")


def _strongest(points: Sequence[Any], count: int) -> tuple[Any, ...]:
    best = sorted(points, key=lambda point: -point.score)[:count]
    return tuple(sorted(best, key=lambda point: point.ds))


SCENES: Final[tuple[Callable[[Stage], None], ...]] = (
    semantic_search,
    entities,
    masks,
    sentiment,
    topics,
    forecast,
    decomposition,
    anomalies,
)
