"""How the files of deployments are written."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["PlainDumper", "Section"]

#: A mapping of a YAML document.
Section = dict[str, Any]


class PlainDumper(yaml.SafeDumper):
    """Writes what is the same twice, without anchors: people read it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
