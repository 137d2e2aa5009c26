"""``cortex run``: jobs from arguments, from lines of text or from JSON lines; answers for people or as JSON lines."""

from __future__ import annotations

import io
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, get_args

import click

from cortex_tasks.catalog import InputKind, TaskSpec, task_spec
from cortex_tasks.cli.exits import FAILED, exit_code
from cortex_tasks.errors import CortexError, DeliveryError, InvalidInput, InvalidParameter
from cortex_tasks.payloads import Lane, Result

__all__ = ["open_client", "parse_line", "run"]

#: A line of input longer than this is refused before it is parsed, in characters.
_MAX_LINE: Final = 16_000_000
_OPTIONS: Final = frozenset({"task", "inputs", "model", "lane", "deadline_s", "timeout_s", "errors", "progress"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One input with its name: the ``id`` of its JSON line, else its number from 0. ``value`` may be an error."""

    id: Any
    value: Any


def open_client() -> Any:
    """The client that the command uses; tests put their own in its place."""
    from cortex_tasks.client import Cortex

    return Cortex()


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("task")
@click.argument("text", nargs=-1)
@click.option("-m", "--model", help="Alias of queues.yaml. Default: the first that serves the task.")
@click.option("-p", "--param", "pairs", multiple=True, metavar="KEY=VALUE", help="A parameter; VALUE is JSON or text.")
@click.option("--lane", type=click.Choice(get_args(Lane)), help="Default: interactive for TEXT, bulk for stdin.")
@click.option("--deadline-s", type=float, help="Drop jobs that have not begun by then.")
@click.option("--timeout-s", type=float, help="How long to wait for an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, in order.")
@click.option("--jsonl", is_flag=True, help='Read JSON lines too: a text, a series {"ds", "y"}, or {"id", "text"}.')
def run(
    task: str,
    text: tuple[str, ...],
    model: str | None,
    pairs: tuple[str, ...],
    lane: Lane | None,
    deadline_s: float | None,
    timeout_s: float | None,
    as_json: bool,
    jsonl: bool,
) -> None:
    """Run TASK on each TEXT, or on each line of stdin.

    \b
    cortex run embed "A sentence."
    cortex run zero_shot "Cheaper fares from May." -p 'labels=["travel", "sport"]'
    cortex run annotate --jsonl < texts.jsonl > entities.jsonl
    cortex run forecast --jsonl -p horizon=14 < series.jsonl

    Answers go to stdout in the inputs' order, errors of single inputs to stderr (with --json, in their place).
    """
    spec = task_spec(task)
    if not text and sys.stdin.isatty():
        raise click.UsageError("give TEXT, or lines on stdin")
    options: dict[str, Any] = {"lane": lane or ("interactive" if text else "bulk"), **_params(pairs)}
    # A progress line where neither the answers nor a few arguments stand in its place.
    options["progress"] = None if not text and not sys.stdout.isatty() else False
    options |= {k: v for k, v in (("deadline_s", deadline_s), ("timeout_s", timeout_s)) if v is not None}
    _utf8_streams()
    entries = _from_arguments(spec, text) if text else _from_lines(spec, sys.stdin, jsonl=jsonl)
    with closing(open_client()) as client:
        answers = answered(client, spec, entries, model, options)
        raise SystemExit(_print(answers, as_json=as_json or jsonl))


def _utf8_streams() -> None:
    """Bytes that are no UTF-8 become the error of their line, and no character of an answer breaks the output."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _params(pairs: Iterable[str]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InvalidParameter(f"-p takes KEY=VALUE, not {pair!r}")
        if name in _OPTIONS:
            raise InvalidParameter(
                f"-p takes parameters of the task; {name!r} is an option of its own or of no use here"
            )
        try:
            params[name] = json.loads(text)
        except ValueError:
            params[name] = text
    return params


# ---------------------------------------------------------------------------------------------------- inputs


def _from_arguments(spec: TaskSpec, texts: Iterable[str]) -> Iterator[Entry]:
    for number, text in enumerate(texts):
        yield parse_line(text, number, jsonl=spec.input is InputKind.SERIES)


def _from_lines(spec: TaskSpec, lines: Iterable[str], *, jsonl: bool) -> Iterator[Entry]:
    """Blank lines are no inputs."""
    number = 0
    for line in lines:
        if line.strip():
            yield parse_line(line.rstrip("\r\n"), number, jsonl=jsonl or spec.input is InputKind.SERIES)
            number += 1


def parse_line(line: str, number: int, *, jsonl: bool) -> Entry:
    """One line of input. What is no JSON becomes the error of this input alone."""
    if len(line) > _MAX_LINE:
        return Entry(number, InvalidInput(f"a line of {len(line):,} characters is over the limit of {_MAX_LINE:,}"))
    if not jsonl:
        return Entry(number, line)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Entry(number, InvalidInput(f"input {number} is not JSON: {error}"))
    if not isinstance(value, Mapping):
        return Entry(number, value)
    name = value.get("id", number)
    for key in ("text", "series"):
        if key in value:
            return Entry(name, value[key])
    if "ds" in value and "y" in value:
        return Entry(name, {"ds": value["ds"], "y": value["y"]})
    return Entry(name, InvalidInput(f"input {name!r} has neither 'text' nor 'series' nor 'ds' and 'y'"))


# --------------------------------------------------------------------------------------------------- answers


def answered(
    client: Any, spec: TaskSpec, entries: Iterable[Entry], model: str | None, options: Mapping[str, Any]
) -> Iterator[tuple[Entry, Result | CortexError]]:
    """Each entry with its answer, in order; entries that are errors already are not sent."""
    waiting: deque[Entry] = deque()

    def good() -> Iterator[Any]:
        for entry in entries:
            waiting.append(entry)
            if not isinstance(entry.value, CortexError):
                yield entry.value

    with closing(client.map(spec.name, good(), model, errors="return", **options)) as answers:
        for answer in answers:
            yield from _leading_errors(waiting)
            yield waiting.popleft(), answer
    yield from _leading_errors(waiting)


def _leading_errors(waiting: deque[Entry]) -> Iterator[tuple[Entry, CortexError]]:
    while waiting and isinstance(waiting[0].value, CortexError):
        entry = waiting.popleft()
        yield entry, entry.value


def _print(answers: Iterable[tuple[Entry, Result | CortexError]], *, as_json: bool) -> int:
    """Print as the answers come; returns the exit code."""
    from cortex_tasks.show import as_record, show
    from cortex_tasks.terminal import style_for

    failures: list[CortexError] = []
    count = 0
    style = style_for(sys.stdout)
    for entry, answer in answers:
        count += 1
        if isinstance(answer, CortexError):
            failures.append(answer)
        if as_json:
            click.echo(json.dumps(as_record(entry.id, answer), ensure_ascii=False))
        elif isinstance(answer, CortexError):
            click.echo(f"cortex: input {entry.id}: {answer}", err=True)
        else:
            click.echo("\n".join(show(entry.value, answer, style)))
        sys.stdout.flush()
    if not failures:
        return 0
    # Nothing came through at all: the fleet's fault, and a script may want to try again.
    delivered = len(failures) < count or not all(isinstance(failure, DeliveryError) for failure in failures)
    return FAILED if delivered else exit_code(failures[0])
