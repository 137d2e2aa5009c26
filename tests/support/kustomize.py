"""As much of ``kustomize build`` as deploy/kubernetes uses, for where no kustomize is; anything else is refused.

Resources, components, strategic merge patches in files, images, one namespace, ConfigMaps from files (without the hash
in their names). Lists whose members have names are merged by name, others are replaced: so Kubernetes does with the
lists that are patched here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["build", "merged"]

Document = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images", "configMapGenerator"}
_CLUSTER_WIDE = {"Namespace"}


def build(folder: Path) -> list[Document]:
    """The documents of an overlay. Raises ValueError on what is not understood here."""
    return _build(folder, [])


def _build(folder: Path, given: list[Document]) -> list[Document]:
    stated = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := set(stated) - _KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)}")
    documents = list(given)
    for name in stated.get("resources", ()):
        documents += _build(folder / name, []) if (folder / name).is_dir() else _read(folder / name)
    documents += [_config_map(folder, wanted) for wanted in stated.get("configMapGenerator", ())]
    for name in stated.get("components", ()):
        documents = _build(folder / name, documents)
    for patch in stated.get("patches", ()):
        if set(patch) != {"path"}:
            raise ValueError(f"{folder}: {patch}")
        for change in _read(folder / patch["path"]):
            documents = _patched(documents, change)
    for document in documents:
        if "namespace" in stated and document["kind"] not in _CLUSTER_WIDE:
            document["metadata"]["namespace"] = stated["namespace"]
        _name_images(document, stated.get("images", ()))
    return documents


def _read(file: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document]


def _config_map(folder: Path, wanted: Document) -> Document:
    if set(wanted) != {"name", "files"}:
        raise ValueError(f"{folder}: {wanted}")
    data = {name: (folder / name).read_text(encoding="utf-8") for name in wanted["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": wanted["name"]}, "data": data}


def _key(document: Document) -> tuple[str, str, str]:
    return document["apiVersion"], document["kind"], document["metadata"]["name"]


def _patched(documents: list[Document], change: Document) -> list[Document]:
    if _key(change) not in map(_key, documents):
        raise ValueError(f"nothing to patch: {_key(change)}")
    return [merged(document, change) if _key(document) == _key(change) else document for document in documents]


def merged(base: Any, change: Any) -> Any:
    """``base`` as a strategic merge patch leaves it."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}}
    if isinstance(base, list) and isinstance(change, list) and all(_named(one) for one in (*base, *change)):
        by_name = {one["name"]: one for one in base}
        return list((by_name | {one["name"]: merged(by_name.get(one["name"]), one) for one in change}).values())
    return change


def _named(one: Any) -> bool:
    return isinstance(one, dict) and "name" in one


def _name_images(document: Document, images: Any) -> None:
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    for container in pod.get("containers", ()):
        for image in images:
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
