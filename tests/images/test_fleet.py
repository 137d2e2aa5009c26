"""The images at work, as docker/compose.yaml runs them: jobs from outside; workers that stop, die or starve."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import redis

from cortex_tasks import Cortex, Job
from cortex_tasks.presence import WorkerCard, read_cards
from tests.images.engine import ROOT
from tests.images.fleet import SECRETS, SERVICES, ImagesFleet
from tests.support.worker_process import poll_until

pytestmark = [pytest.mark.images, pytest.mark.timeout(1_800)]

WORKERS: Final = (("nlp", 1), ("nlp", 2), ("ml", 1))
SERIES: Final = {"ds": [f"2024-01-{day:02}" for day in range(1, 29)], "y": [float(day % 7) for day in range(28)]}
#: Seconds. A dead worker's jobs move on after a lease and a sweep (35 s), and there are only so many cores.
PATIENCE_S: Final = 300.0
#: From a worker's last sign of life to the engine's verdict: 60 s, and three checks of 15 s.
VERDICT_S: Final = 180.0


@pytest.fixture(scope="module")
def cortex(fleet: ImagesFleet) -> Iterator[Cortex]:
    with fleet.client() as client:
        yield client


def texts(what: str, count: int) -> list[str]:
    return [f"{what}, sentence number {number} of a story about owls, bread and bridges." for number in range(count)]


def submitted(cortex: Cortex, what: str, count: int) -> list[Job[Any]]:
    """One job a text, all of them computed."""
    return [cortex.submit("embed", [text], cache="off") for text in texts(what, count)]


def all_answered(jobs: list[Job[Any]]) -> None:
    for job in jobs:
        assert job.result(PATIENCE_S).values()[0].vector.shape == (384,)


def started(jobs: list[Job[Any]]) -> Callable[[], bool]:
    return lambda: any(job.done() for job in jobs) and not all(job.done() for job in jobs)


# ------------------------------------------------------------------------------------------------ it answers


def test_every_model_answers_from_outside(cortex: Cortex) -> None:
    sentence = "Marie Curie moved to Paris in 1891."
    assert cortex.embed(sentence).dimensions == 384
    assert any(entity.text == "Marie Curie" for entity in cortex.annotate(sentence).entities)
    assert len(cortex.forecast(SERIES, horizon=7).ds) == 7
    assert cortex.classify("A sentence.", model="glutton").label


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_healthy(fleet: ImagesFleet, service: str) -> None:
    assert fleet.state(service)["Health"]["Status"] == "healthy"


# ------------------------------------------------------------------------------------------- what it may do


@pytest.mark.parametrize(("service", "number"), WORKERS)
def test_a_worker_may_do_next_to_nothing(fleet: ImagesFleet, service: str, number: int) -> None:
    said = fleet.execute(service, "id -u; id -g; cat /proc/1/comm; cat /proc/[0-9]*/status", number)
    assert said.splitlines()[:3] == ["10001", "10001", "tini"]
    rights = [line.split() for line in said.splitlines() if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))]
    assert rights
    assert all(int(value, 16) == (name == "NoNewPrivs:") for name, value in rights)


@pytest.mark.parametrize("service", ["nlp", "ml", "flower", "metrics", "redis-broker", "redis-cache"])
def test_the_root_file_system_is_read_only(fleet: ImagesFleet, service: str) -> None:
    script = "for f in / /opt /etc /var/tmp /usr/bin /root; do touch $f/x 2>/dev/null && echo $f; done; touch /tmp/x"
    assert fleet.execute(service, script) == ""


@pytest.mark.parametrize(("service", "number"), WORKERS)
def test_models_cache_and_tmp_can_be_written(fleet: ImagesFleet, service: str, number: int) -> None:
    fleet.execute(service, "for f in /models /cache /tmp; do touch $f/x && rm $f/x || exit 1; done", number)


@pytest.mark.parametrize("service", ["nlp", "ml"])
def test_the_limits_are_those_of_queues_yaml(fleet: ImagesFleet, service: str) -> None:
    _, limit = fleet.memory(service)
    # The kernel counts in pages.
    assert abs(limit - fleet.config.images[service].memory) < 2**16
    host = fleet.engine.inspect(fleet.container(service))["HostConfig"]
    assert 0 < host["NanoCpus"] <= fleet.config.images[service].cpus * 1e9
    assert host["MemorySwap"] == host["Memory"]


def test_passwords_are_not_to_be_seen(fleet: ImagesFleet) -> None:
    secrets = [(SECRETS / name).read_text(encoding="utf-8").strip() for name in ("broker_password", "cache_password")]
    for service in SERVICES:
        seen = json.dumps(fleet.engine.inspect(fleet.container(service)))
        seen += fleet.execute(service, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        seen += fleet.engine.docker("logs", fleet.container(service))
        assert not any(secret in seen for secret in secrets), service


# --------------------------------------------------------------------------------------------- who watches


def test_flower_asks_who_you_are(fleet: ImagesFleet) -> None:
    user, _, password = (SECRETS / "flower_auth").read_text(encoding="utf-8").strip().partition(":")
    with httpx.Client(base_url=f"http://127.0.0.1:{fleet.flower_port}", timeout=30) as browser:
        assert browser.get("/workers").status_code == 401
        assert browser.get("/workers", auth=(user, "wrong")).status_code == 401
        assert browser.get("/workers", auth=(user, password)).status_code == 200


def test_prometheus_finds_what_it_scrapes(fleet: ImagesFleet) -> None:
    read = "import urllib.request as r, sys; print(r.urlopen(sys.argv[1], timeout=20).read().decode())"
    ours = fleet.execute("flower", f"python -c '{read}' http://metrics:9540/metrics")
    assert 'cortex_workers{image="nlp",state="ready"} 2' in ours
    assert 'cortex_workers{image="ml",state="ready"} 1' in ours
    assert "cortex_cache_entries" in ours
    assert "flower_worker_online" in fleet.execute("metrics", f"python -c '{read}' http://flower:5555/metrics")


# ------------------------------------------------------------------------------------- workers come and go


def test_memory_stays_below_the_limit(fleet: ImagesFleet, cortex: Cortex) -> None:
    all_answered(submitted(cortex, "memory", 1_000))
    for job in [cortex.submit("forecast", [SERIES], horizon=h, cache="off") for h in range(1, 41)]:
        assert job.result(PATIENCE_S).values()[0].ds
    for service, number in WORKERS:
        peak, limit = fleet.memory(service, number)
        print(f"{service}-{number}: at most {peak / 1e6:,.0f} MB of {limit / 1e6:,.0f} MB after 1,000 jobs")
        assert peak < 0.9 * limit
        assert fleet.state(service, number)["OOMKilled"] is False


def test_a_worker_that_is_told_to_stop_loses_nothing(fleet: ImagesFleet, cortex: Cortex) -> None:
    jobs = submitted(cortex, "term", 1_000)
    poll_until(started(jobs), "the first answers", PATIENCE_S)
    fleet.compose("stop", "ml")
    fleet.engine.docker("stop", fleet.container("nlp", 1))
    for service in ("nlp", "ml"):
        assert fleet.state(service)["ExitCode"] == 0
    all_answered(jobs)
    fleet.up()


def test_a_worker_that_is_killed_loses_nothing(fleet: ImagesFleet, cortex: Cortex) -> None:
    jobs = submitted(cortex, "kill", 1_000)
    poll_until(started(jobs), "the first answers", PATIENCE_S)
    fleet.engine.docker("kill", "--signal", "KILL", fleet.container("nlp", 1))
    assert fleet.state("nlp")["ExitCode"] == 137
    all_answered(jobs)
    fleet.up()


def test_a_worker_that_runs_out_of_memory_leaves_the_others_serving(fleet: ImagesFleet, cortex: Cortex) -> None:
    restarts = fleet.state("nlp", 1)["Restarts"]
    fleet.execute("nlp", "touch /tmp/eat", 1)
    jobs = submitted(cortex, "starve", 200)
    hungry: list[Job[Any]] = []

    def starved() -> bool:
        # Another each time, since the other worker may have been faster: it eats nothing.
        hungry.extend(cortex.submit("classify", [text], "glutton", cache="off") for text in texts("eat", 1))
        return fleet.state("nlp", 1)["Restarts"] > restarts

    poll_until(starved, "the kernel kills a worker", PATIENCE_S)
    # While it is away:
    assert cortex.embed("Is anybody there?", cache="off").dimensions == 384
    assert len(cortex.forecast(SERIES, horizon=3).ds) == 3
    assert fleet.state("nlp", 2)["OOMKilled"] is False
    assert (fleet.state("nlp", 2)["Restarts"], fleet.state("ml")["Restarts"]) == (0, 0)
    all_answered(jobs)
    for job in hungry:
        assert job.result(PATIENCE_S).values()[0].label
    poll_until(lambda: fleet.state("nlp", 1)["Health"]["Status"] == "healthy", "it is back", PATIENCE_S)


def test_a_worker_that_stands_still_is_unhealthy(fleet: ImagesFleet) -> None:
    # tini is 1; the worker is its child.
    fleet.execute("nlp", "kill -STOP $(cat /proc/1/task/1/children)", 2)
    began_s = time.monotonic()
    poll_until(lambda: fleet.state("nlp", 2)["Health"]["Status"] == "unhealthy", "the engine notices", VERDICT_S)
    print(f"unhealthy after {time.monotonic() - began_s:.0f} s")
    said = fleet.state("nlp", 2)["Health"]["Log"][-1]["Output"]
    assert "no heartbeat for" in said
    fleet.execute("nlp", "kill -CONT $(cat /proc/1/task/1/children)", 2)
    poll_until(lambda: fleet.state("nlp", 2)["Health"]["Status"] == "healthy", "it is well again", VERDICT_S)


def ready(client: redis.Redis, image: str) -> list[WorkerCard]:
    return [card for card in read_cards(client) if card.image == image and card.state == "ready"]


@pytest.fixture
def broker(fleet: ImagesFleet) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(fleet.settings().broker) as client:
        yield client


def test_the_development_image_starts_anew_when_a_file_changes(
    fleet: ImagesFleet, images: dict[str, str], broker: redis.Redis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("src")
    source.chmod(0o755)
    for name in ("cortex_tasks", "workers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    queues, code = source / "queues.yaml", source / "workers" / "app.py"
    shutil.copy2(ROOT / "queues.yaml", queues)

    def change(file: Path, old: str, new: str) -> None:
        before = file.read_text(encoding="utf-8")
        assert old in before
        fresh = file.with_suffix(".fresh")
        fresh.write_text(before.replace(old, new), encoding="utf-8")
        fresh.replace(file)

    with fleet.one_more("dev", images["dev"], "-v", f"{source}:/src:ro") as name:
        (first,) = poll_until(lambda: ready(broker, "dev"), "the worker is ready", PATIENCE_S)
        change(queues, "queue: prophet", "queue: series")
        change(queues, "prophet]", "series]")

        def reads_series() -> list[WorkerCard]:
            return [card for card in ready(broker, "dev") if "series" in card.queues]

        (second,) = poll_until(reads_series, "it has read queues.yaml", PATIENCE_S)
        assert second.pid != first.pid
        change(code, "cut = fleet is not self.fleet", "cut = True")

        def says_so() -> bool:
            return "less than queues.yaml says" in fleet.engine.logs(name)

        poll_until(says_so, "it runs the changed code", PATIENCE_S)
        anew = poll_until(
            lambda: [card for card in reads_series() if card.pid != second.pid], "it is ready again", PATIENCE_S
        )
        assert anew[0].pid != first.pid


@pytest.mark.parametrize("worker", ["prod", "dev"])
def test_the_workers_of_other_profiles_start_and_answer(fleet: ImagesFleet, broker: redis.Redis, worker: str) -> None:
    """Beside the others, whom it takes work from: only what its own card counts is proof."""
    with fleet.profile(worker), fleet.client() as cortex:
        (card,) = poll_until(lambda: ready(broker, worker), "its card", PATIENCE_S)
        assert set(card.queues) >= set(fleet.config.images[worker].queues) - {"glutton"}

        def has_answered() -> bool:
            all_answered(submitted(cortex, f"for {worker}", 64))
            (now,) = ready(broker, worker)
            return now.jobs > 0

        poll_until(has_answered, "it answers jobs", PATIENCE_S)
        assert fleet.state(worker)["Health"]["Status"] == "healthy"


def test_a_worker_keeps_within_a_container_that_is_smaller_than_queues_yaml_says(
    fleet: ImagesFleet, images: dict[str, str], broker: redis.Redis
) -> None:
    limits = ("--memory", "2g", "--memory-swap", "2g", "--cpus", "1", "--hostname", "small")
    with fleet.one_more("small", images["nlp"], *limits) as name, fleet.client() as cortex:
        (card,) = poll_until(
            lambda: [card for card in ready(broker, "nlp") if card.host == "small"], "its card", PATIENCE_S
        )
        usual = next(card for card in ready(broker, "nlp") if card.host != "small")
        for budget in ("model_cache", "inference_buffer"):
            limit_bytes, usual_bytes = (one.store.budgets[budget].limit_bytes for one in (card, usual))
            assert 0 < limit_bytes < usual_bytes / 2, budget
        said = fleet.engine.logs(name)
        assert ": 1 threads; models " in said
        assert "less than queues.yaml says" in said

        def has_answered() -> bool:
            all_answered(submitted(cortex, "in little room", 64))
            (now,) = (card for card in ready(broker, "nlp") if card.host == "small")
            return now.jobs > 0

        poll_until(has_answered, "it answers jobs", PATIENCE_S)
        state = fleet.engine.inspect(name)["State"]
        assert (state["Status"], state["OOMKilled"]) == ("running", False)
