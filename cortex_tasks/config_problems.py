"""What pydantic found wrong, in words for the person who wrote the file or set the variable."""

from __future__ import annotations

import re
from types import UnionType
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from cortex_tasks.catalog import nearest
from cortex_tasks.config_wiring import KeyPath

__all__ = ["dotted", "explain", "kind_of", "reason"]

_EXPECTED: Final = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "path_type": "a path",
}
_SECRET: Final = re.compile(r"(?i)secret|passw|token$|credential|api_?key")
_PLAIN_KEY: Final = re.compile(r"[\w-]+(\.[\w-]+)*")
_SHOWN_CHARS: Final = 40


def explain(error: ErrorDetails, root: type[BaseModel]) -> tuple[KeyPath, str]:
    """The path of an error and the words for it. ``root``: the model that was validated."""
    path: KeyPath = tuple(error["loc"])
    if path[-1:] == ("[key]",):
        path = path[:-1]
    if error["type"] == "extra_forbidden":
        return path, "unknown key" + nearest(str(path[-1]), _fields(root, path[:-1]))
    if error["type"] == "missing":
        return path, "missing"
    said = reason(error)
    # A validator of ours has named the value already, and an empty list has none.
    got = "" if error["type"] in ("value_error", "too_short") else f", got {_shown(path, error['input'])}"
    return path, said + got


def reason(error: ErrorDetails) -> str:
    """What was expected, without the value."""
    kind = error["type"]
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}"
    if kind == "literal_error":
        return f"expected {error['ctx']['expected']}"
    if kind == "too_short":
        return "must not be empty"
    text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return text.replace("Input should be", "must be", 1)


def dotted(path: KeyPath) -> str:
    """``models.minilm.tasks[0]``; a key that is not a plain name is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _PLAIN_KEY.fullmatch(part) else repr(part[:_SHOWN_CHARS])
            text += f".{name}" if text else name
    return text


def kind_of(value: Any) -> str:
    """The YAML name of a value's kind."""
    names: list[tuple[Any, str]] = [
        (type(None), "nothing"), (bool, "true or false"), (int | float, "a number"), (str, "text"),
        (list | tuple, "a list"), (dict, "a mapping"),
    ]  # fmt: skip
    return next((name for cls, name in names if isinstance(value, cls)), type(value).__name__)


def _shown(path: KeyPath, value: Any) -> str:
    """A value as a message may show it: short, and never one that could be a secret."""
    hidden = any(isinstance(part, str) and _SECRET.search(part) for part in path)
    if value is None or hidden or isinstance(value, list | tuple | dict):
        return kind_of(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if "@" in value or _SECRET.search(value) or len(value) > _SHOWN_CHARS:
            return "text"
        return f"text {value!r}"
    return repr(value)[:_SHOWN_CHARS]


def _fields(root: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that the section at a path may have."""
    kind: Any = root
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        if get_origin(kind) is UnionType:  # a section that may be absent
            kind = get_args(kind)[0]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
