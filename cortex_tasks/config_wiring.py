"""Do the models, queues and images of a queues.yaml fit together?

Works on plain mappings and tolerates parts of a wrong shape (the schema reports those), so that one reading of
the file names every problem at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cortex_tasks.catalog import nearest

__all__ = ["KeyPath", "disagreements"]

KeyPath = tuple[str | int, ...]
Sections = Mapping[str, Mapping[str, Any]]
_QUEUE_LISTS = ("queues", "gpu_queues")


def disagreements(raw: Any) -> Iterator[tuple[KeyPath, str]]:
    """The path and the explanation of each disagreement."""
    models, images = _sections(raw, "models"), _sections(raw, "images")
    if not models or not images:
        return
    yield from _unserved(models, images)
    yield from _unknown_queues(models, images)
    yield from _stray_queues(models, images)


def _sections(raw: Any, key: str) -> dict[str, Mapping[str, Any]]:
    found = raw.get(key) if isinstance(raw, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, Mapping)}


def _names(section: Mapping[str, Any], key: str) -> list[tuple[int, str]]:
    values = section.get(key)
    if not isinstance(values, list | tuple):
        return []
    return [(index, value) for index, value in enumerate(values) if isinstance(value, str)]


def _served(image: Mapping[str, Any]) -> list[str]:
    return [queue for key in _QUEUE_LISTS for _, queue in _names(image, key)]


def _unserved(models: Sections, images: Sections) -> Iterator[tuple[KeyPath, str]]:
    """Models that name an image there is not, or whose queue none or not all of their images consume."""
    everything = {queue for image in images.values() for queue in _served(image)}
    for alias, model in models.items():
        queue = model.get("queue")
        for index, name in _names(model, "images"):
            if name not in images:
                yield ("models", alias, "images", index), f"unknown image {name!r}{nearest(name, images)}"
            elif isinstance(queue, str) and queue in everything and queue not in _served(images[name]):
                message = f"image {name!r} does not serve queue {queue!r}{nearest(queue, _served(images[name]))}"
                yield ("models", alias, "images", index), message
        if isinstance(queue, str) and queue not in everything:
            yield ("models", alias, "queue"), f"no image serves queue {queue!r}{nearest(queue, everything)}"


def _unknown_queues(models: Sections, images: Sections) -> Iterator[tuple[KeyPath, str]]:
    """Queues of an image that no model has."""
    known = {model["queue"] for model in models.values() if isinstance(model.get("queue"), str)}
    for name, image in images.items():
        for key in _QUEUE_LISTS:
            for index, queue in _names(image, key):
                if queue not in known:
                    yield ("images", name, key, index), f"no model has queue {queue!r}{nearest(queue, known)}"


def _stray_queues(models: Sections, images: Sections) -> Iterator[tuple[KeyPath, str]]:
    """Queues that an image consumes without the models whose jobs come on them."""
    for name, image in images.items():
        for key in _QUEUE_LISTS:
            for index, queue in _names(image, key):
                for alias, model in models.items():
                    listed = [image_name for _, image_name in _names(model, "images")]
                    if model.get("queue") == queue and listed and name not in listed:
                        message = (
                            f"the image consumes queue {queue!r} but does not hold model {alias!r}; "
                            f"add {name!r} to models.{alias}.images or take the queue away"
                        )
                        yield ("images", name, key, index), message
