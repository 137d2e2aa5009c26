"""YAML text -> plain values, with the line on which each of them stands.

A strict, bounded reading of YAML: mappings with text keys, lists, text, numbers, true/false and null. Anchors,
aliases and merge keys work. Duplicate keys and other tags are problems; so is a document that grows without bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

__all__ = ["MAX_BYTES", "Document", "KeyPath", "Problem", "read_document"]

#: Largest document, in bytes.
MAX_BYTES: Final = 1 << 20
#: Values after the expansion of aliases: a few lines of aliases of aliases can stand for billions.
_MAX_VALUES: Final = 20_000
_MAX_DEPTH: Final = 24
_TAG: Final = "tag:yaml.org,2002:"
# yaml's dates stay text: nothing in the file is a date, and a version such as 2024-01-01 is a name.
_TEXT_TAGS: Final = frozenset(_TAG + kind for kind in ("str", "timestamp", "value"))
_INT64: Final = range(-(2**63), 2**63)

KeyPath = tuple[str | int, ...]


class Problem(NamedTuple):
    """One thing that is wrong: its line (from 1), the path to it, and what to say."""

    line: int
    path: KeyPath
    message: str


class Fatal(Exception):
    """The text cannot be read any further; holds the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Document:
    """What was read. ``lines`` maps the path of each value to its line (of its key, inside a mapping)."""

    value: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...]

    def line(self, path: KeyPath) -> int:
        """The line of a value, or of the innermost part around it that the file holds."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_document(text: str) -> Document:
    """Parse. Never raises: what cannot be read becomes a problem."""
    reader = _Reader()
    value = None
    try:
        node = _compose(text)
        if node is not None:
            value = reader.read(node, (), 0)
    except Fatal as fatal:
        reader.problems.append(fatal.problem)
    return Document(value, reader.lines, tuple(reader.problems))


def _compose(text: str) -> Node | None:
    try:
        node: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise Fatal(Problem(mark.line + 1 if mark else 1, (), f"not valid YAML: {what}")) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Fatal(Problem(line, (), "not valid YAML: a control character")) from None
    except RecursionError:
        raise Fatal(Problem(1, (), "nested too deeply")) from None
    except (ValueError, OverflowError):
        # The scanner lets the ValueError of an impossible escape such as "\UFFFFFFFF" through.
        raise Fatal(Problem(1, (), "not valid YAML: an escape that is no character")) from None
    return node


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


class _Reader:
    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._values = 0
        # Resolves and converts plain scalars; it is given no text of its own.
        self._yaml: Any = yaml.SafeLoader("")

    def read(self, node: Node, path: KeyPath, depth: int) -> Any:
        self._count(node, path, depth)
        self.lines.setdefault(path, _line(node))
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            self._standard(node, path, "seq")
            return [self.read(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _count(self, node: Node, path: KeyPath, depth: int) -> None:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise Fatal(Problem(_line(node), path, f"more than {_MAX_VALUES} values, with its aliases expanded"))
        if depth > _MAX_DEPTH:
            raise Fatal(Problem(_line(node), path[:8], f"nested more than {_MAX_DEPTH} levels deep"))

    def _standard(self, node: Node, path: KeyPath, kind: str) -> None:
        if node.tag != _TAG + kind:
            self.problems.append(Problem(_line(node), path, "tags are not allowed here"))

    def _mapping(self, node: MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        self._standard(node, path, "map")
        found: dict[str, Any] = {}
        for key, value in self._own_pairs(node, path):
            where = (*path, key.value)
            if key.value in found:
                first = self.lines[where]
                self.problems.append(Problem(_line(key), where, f"duplicate key; it is first on line {first}"))
            else:
                self.lines[where] = _line(key)
                found[key.value] = self.read(value, where, depth + 1)
        for key, value in self._merged_pairs(node, path, depth):
            if key.value not in found:
                self.lines[(*path, key.value)] = _line(key)
                found[key.value] = self.read(value, (*path, key.value), depth + 1)
        return found

    def _own_pairs(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[ScalarNode, Node]]:
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                continue
            if isinstance(key, ScalarNode) and key.tag in _TEXT_TAGS and _is_text(key.value):
                yield key, value
            else:
                self.problems.append(Problem(_line(key), path, "a key is not text; put it in quotes"))

    def _merged_pairs(self, node: MappingNode, path: KeyPath, depth: int) -> Iterator[tuple[ScalarNode, Node]]:
        """Keys that ``<<`` brings, the strongest first: earlier mappings win, own keys over what they merge."""
        for key, value in node.value:
            if key.tag != _TAG + "merge":
                continue
            sources = value.value if isinstance(value, SequenceNode) else [value]
            for source in sources:
                if not isinstance(source, MappingNode):
                    self.problems.append(Problem(_line(key), path, "'<<' takes a mapping or a list of mappings"))
                    continue
                self._count(source, path, depth)
                yield from self._own_pairs(source, path)
                yield from self._merged_pairs(source, path, depth + 1)

    def _scalar(self, node: Node, path: KeyPath) -> Any:
        text: str = node.value
        if node.tag in _TEXT_TAGS:
            if not _is_text(text):
                self.problems.append(Problem(_line(node), path, "not valid Unicode text"))
            return text
        kind = node.tag.removeprefix(_TAG)
        plain = self._yaml.resolve(ScalarNode, text, (True, False)) == node.tag
        if not plain or kind not in ("null", "bool", "int", "float"):
            self.problems.append(Problem(_line(node), path, "not a value of its tag, or the tag is not allowed here"))
            return None
        try:
            value = getattr(self._yaml, f"construct_yaml_{kind}")(node)
        except ValueError:
            value = None
            self.problems.append(Problem(_line(node), path, "not a number"))
        if isinstance(value, int) and value not in _INT64:
            self.problems.append(Problem(_line(node), path, "the number is too large"))
        return value


def _is_text(value: str) -> bool:
    """Whether a string can be printed and sent: an escape may have made half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
