"""The English pipeline for a machine without a trained one: spaCy's tokenizer, sentences and entities by rule.

The rules are tables. A pattern is a list of token descriptions (spaCy's ``Matcher``) or a phrase. They are
tried in stages: a stage never touches what an earlier one found, and within a stage the longest match wins.
Repetitions are bounded, so that the work is linear in the text. The labels are those of spaCy's English models;
unlike there, a PERSON includes the title it was found by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from workers.adapters._spacy_names import GIVEN_NAMES, ORGANISATIONS, PLACES, SUFFIXES, TITLES

__all__ = ["STAGES", "blank_pipeline"]

Pattern = str | list[dict[str, Any]]


def _one_of(*words: str) -> dict[str, Any]:
    """A token that is one of these, in any case."""
    return {"LOWER": {"IN": list(words)}}


def _exactly(*words: str) -> dict[str, Any]:
    return {"TEXT": {"IN": list(words)}}


def _like(expression: str) -> dict[str, Any]:
    return {"TEXT": {"REGEX": f"^(?:{expression})$"}}


def _maybe(token: dict[str, Any]) -> dict[str, Any]:
    return {**token, "OP": "?"}


def _up_to(token: dict[str, Any], most: int, least: int = 0) -> dict[str, Any]:
    return {**token, "OP": f"{{{least},{most}}}"}


# ------------------------------------------------------------------------------------------------- numbers

_FIGURE = _like(r"[+-]?\d[\d,.]*(?:k|m|bn|mn|tn|K|M|B)?")
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty",
    "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million", "billion", "trillion", "dozen",
)  # fmt: skip
_NUMBER_WORD = _one_of(*_NUMBER_WORDS)
_MAGNITUDE = _like(r"(?i:hundred|thousand|million|billion|trillion|bn|mn|tn|k|m|b)")
_AMOUNTS: tuple[list[dict[str, Any]], ...] = (
    [_FIGURE, _maybe(_MAGNITUDE)],
    [_up_to(_NUMBER_WORD, 5, 1)],
)
_CURRENCY_SIGN = _like(r"(?:US|A|C|NZ|HK|S|R)?[$€£¥₹₽₩₺]")
_CURRENCY_CODE = _exactly("USD", "EUR", "GBP", "JPY", "CHF", "CNY", "CAD", "AUD", "INR", "SEK", "NOK", "DKK", "PLN")
_CURRENCY_WORD = _one_of(
    "dollar", "dollars", "euro", "euros", "pound", "pounds", "yen", "franc", "francs", "yuan", "rupee", "rupees",
    "cent", "cents", "pence", "krona", "kronor", "peso", "pesos",
)  # fmt: skip
_PERCENT_SIGN = _one_of("%", "percent", "pct")
_UNIT = _one_of(
    "km", "m", "cm", "mm", "mi", "mile", "miles", "ft", "feet", "inch", "inches", "metre", "metres", "meter", "meters",
    "kilometre", "kilometres", "kilometer", "kilometers", "kg", "g", "mg", "ton", "tons", "tonne", "tonnes", "lb",
    "lbs", "oz", "gram", "grams", "kilogram", "kilograms", "l", "ml", "litre", "litres", "liter", "liters", "km/h",
    "mph", "kwh", "mw", "gw", "w", "kw", "kb", "mb", "gb", "tb", "hz", "khz", "mhz", "ghz", "acres", "hectares",
)  # fmt: skip
_ORDINAL_WORD = _one_of(
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "twentieth", "hundredth", "thousandth",
)  # fmt: skip

_MONEY: list[Pattern] = [
    [_CURRENCY_SIGN, _FIGURE, _maybe(_MAGNITUDE)],
    [_CURRENCY_CODE, _FIGURE, _maybe(_MAGNITUDE)],
    *([*amount, unit] for amount in _AMOUNTS for unit in (_CURRENCY_SIGN, _CURRENCY_CODE, _CURRENCY_WORD)),
    *([*amount, _exactly("US", "Canadian", "Australian"), _CURRENCY_WORD] for amount in _AMOUNTS),
]
_PERCENT: list[Pattern] = [
    *([*amount, _PERCENT_SIGN] for amount in _AMOUNTS),
    *([*amount, _one_of("per"), _one_of("cent")] for amount in _AMOUNTS),
    [_FIGURE, _one_of("-", "–", "to"), _FIGURE, _PERCENT_SIGN],
]
_QUANTITY: list[Pattern] = [
    *([*amount, _UNIT] for amount in _AMOUNTS),
    [_FIGURE, _exactly("°"), _exactly("C", "F")],
]

# ------------------------------------------------------------------------------------------- dates and times

_MONTH = _one_of(
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december", "jan", "jan.", "feb", "feb.", "mar.", "apr", "apr.", "jun.", "jul", "jul.", "aug", "aug.", "sep",
    "sep.", "sept", "sept.", "oct", "oct.", "nov", "nov.", "dec", "dec.",
)  # fmt: skip
#: Months that are nothing else when written with a capital.
_PLAIN_MONTH = _exactly(
    "January", "February", "April", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DAY = _like(r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?")
_YEAR = _like(r"(?:1[5-9]|20)\d\d")
_HOUR = _like(r"0?\d|1\d|2[0-3]")
_CLOCK = _like(r"(?:[01]?\d|2[0-3])[:.][0-5]\d(?::[0-5]\d)?(?:[ap]\.?m\.?)?")
_HALF_DAY = _one_of("am", "pm", "a.m.", "p.m.", "a.m", "p.m")
_PERIODS = (
    "day", "week", "month", "quarter", "year", "decade", "weekend", "spring", "summer", "autumn", "fall", "winter",
)  # fmt: skip
_LONG_UNIT = _one_of(
    "day", "days", "week", "weeks", "month", "months", "year", "years", "decade", "decades", "century", "centuries",
)  # fmt: skip
_SHORT_UNIT = _one_of("second", "seconds", "minute", "minutes", "hour", "hours", "min", "mins", "hrs")

_DATE: list[Pattern] = [
    [_YEAR, _exactly("-"), _like(r"\d\d?"), _exactly("-"), _like(r"\d\d?(?:T[\d:.]+Z?)?")],
    [_like(r"\d{1,2}[/.]\d{1,2}[/.](?:\d{4}|\d{2})|\d{4}/\d{1,2}/\d{1,2}")],
    [_MONTH, _DAY],
    [_MONTH, _DAY, _maybe(_exactly(",")), _YEAR],
    [_DAY, _maybe(_one_of("of")), _MONTH, _maybe(_exactly(",")), _maybe(_YEAR)],
    [_MONTH, _YEAR],
    [_PLAIN_MONTH],
    [_one_of(*_WEEKDAYS)],
    [_one_of("next", "last", "this", "past", "previous"), _one_of(*_WEEKDAYS, *_PERIODS)],
    [_one_of("today", "tomorrow", "yesterday")],
    [_YEAR],
    [_like(r"(?:1[5-9]|20)?\d0['’]?s")],
    [_like(r"Q[1-4]"), _maybe(_YEAR)],
    *([*amount, _LONG_UNIT, _maybe(_one_of("ago", "old", "later", "earlier"))] for amount in _AMOUNTS),
]
_TIME: list[Pattern] = [
    [_like(r"(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?:[ap]\.?m\.?)?")],
    [_CLOCK, _HALF_DAY],
    [_HOUR, _HALF_DAY],
    [_HOUR, _one_of("o'clock", "o’clock")],
    [_NUMBER_WORD, _one_of("o'clock", "o’clock")],
    [_one_of("noon", "midnight", "tonight")],
    *([*amount, _SHORT_UNIT, _maybe(_one_of("ago", "later", "earlier"))] for amount in _AMOUNTS),
]

# ----------------------------------------------------------------------------------------------------- names

_CAPITAL = r"[A-ZÀ-ÖØ-Þ]"
#: Capitalised words that begin a sentence or a phrase rather than a name.
_NOT_A_NAME = r"(?!(?:The|A|An|This|That|These|Those|Our|My|Your|His|Her|Its|Their|Each|Every|No|In|At|On|Of|For|And)$)"
_NAME = _like(rf"{_CAPITAL}\.|{_NOT_A_NAME}{_CAPITAL}[\w'’-]*\w")
_NAME_OR_AND = _like(rf"{_NOT_A_NAME}{_CAPITAL}[\w'’&-]*|&")
_TYPE_OF_BODY = _exactly("University", "Bank", "Ministry", "Department", "Institute", "Museum", "Church", "Office")

_PERSON: list[Pattern] = [
    [_exactly(*TITLES), _up_to(_NAME, 3, 1)],
    [_exactly(*GIVEN_NAMES), _up_to(_NAME, 2, 1)],
]
_ORG: list[Pattern] = [
    [_like(rf"{_NOT_A_NAME}{_CAPITAL}[\w'’&-]*"), _up_to(_NAME_OR_AND, 4), _maybe(_exactly(",")), _exactly(*SUFFIXES)],
    [_TYPE_OF_BODY, _one_of("of"), _maybe(_one_of("the")), _up_to(_NAME, 3, 1)],
    *ORGANISATIONS,
]

Stage = Mapping[str, Sequence[Pattern]]

#: label -> patterns, stage by stage.
STAGES: Final[tuple[Stage, ...]] = (
    {
        "EMAIL": [[{"LIKE_EMAIL": True}]],
        "URL": [[{"LIKE_URL": True, "LIKE_EMAIL": False}]],
        "MONEY": _MONEY,
        "PERCENT": _PERCENT,
        "QUANTITY": _QUANTITY,
        "DATE": _DATE,
        "TIME": _TIME,
    },
    {"PERSON": _PERSON, "ORG": _ORG, "GPE": list(PLACES)},
    {
        "ORDINAL": [[_like(r"\d+(?:st|nd|rd|th)")], [_ORDINAL_WORD]],
        "CARDINAL": [[_FIGURE, _maybe(_MAGNITUDE)], [_up_to(_NUMBER_WORD, 6, 1)]],
    },
)


def blank_pipeline() -> Any:
    """A ``spacy.Language`` for English: tokenizer, ``sentencizer`` and one ``entity_ruler`` a stage."""
    import spacy

    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    for number, stage in enumerate(STAGES, 1):
        ruler = nlp.add_pipe("entity_ruler", name=f"rules_{number}")
        ruler.add_patterns(
            [{"label": label, "pattern": pattern} for label, patterns in stage.items() for pattern in patterns]
        )
    return nlp
