"""Flower behind a password: ``user:password`` in a file, so that no list of processes or variables shows it."""

from pathlib import Path

basic_auth = [Path("/run/secrets/flower_auth").read_text(encoding="utf-8").strip()]
