"""An engine for the session, every image built, and a fleet of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.engine import ROOT, TARGETS, Engine, NoEngine, find_engine, wheel_options
from tests.images.fleet import ImagesFleet


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        found = find_engine()
    except NoEngine as reason:
        pytest.skip(str(reason))
    yield found
    found.close()


@pytest.fixture(scope="session")
def images(engine: Engine) -> dict[str, str]:
    """The tag of each target, built from this checkout."""
    options = [*wheel_options(), "--build-arg", "VERSION=9.9.9", "--build-arg", "REVISION=abc123"]
    tags = {target: f"datapunk/cortex:{target}" for target in TARGETS}
    for target, tag in tags.items():
        engine.build(ROOT, tag, ROOT / "docker" / "Dockerfile", "--target", target, *options)
    return tags


@pytest.fixture(scope="session")
def redis_image(engine: Engine) -> str | None:
    """A Redis made here where no registry is reached; None: the official one."""
    if engine.lab is None:
        return None
    folder = Path(__file__).parent
    engine.build(folder, "cortex-test/redis", folder / "redis.Dockerfile")
    return "cortex-test/redis"


@pytest.fixture(scope="module")
def fleet(
    engine: Engine, images: dict[str, str], redis_image: str | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ImagesFleet]:
    folder = tmp_path_factory.mktemp("images")
    # The containers' user is nobody here.
    for part in (folder, *folder.parents):
        if re.match(r"pytest-", part.name) or part == folder:
            part.chmod(0o755)
    one = ImagesFleet(engine, folder, redis_image)
    try:
        one.up()
        yield one
    finally:
        one.down()
