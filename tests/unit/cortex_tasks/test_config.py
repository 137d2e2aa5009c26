"""queues.yaml: what is accepted, and that every slip is named with its line and the nearest valid name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cortex_tasks.config import (
    ADAPTERS,
    Batching,
    FleetConfig,
    GpuBatching,
    ModelConfig,
    Settings,
    default_queues_file,
    load_fleet,
    mask_url,
)
from cortex_tasks.errors import ConfigError, UnknownModel
from workers.adapters import ADAPTERS as ADAPTER_TABLE

DEFAULT = default_queues_file().read_text(encoding="utf-8")

SMALL = """\
version: 1
models:
  echo:
    source: "builtin:echo"
    adapter: echo
    tasks: [embed, annotate]
    queue: echo
    images: [nlp]
images:
  nlp:
    queues: [echo]
    cpus: 1
    memory: 1GB
    storage: 1GB
"""


def refused(text: str, tmp_path: Path) -> list[str]:
    """The problems of a file, each as ``LINE: path: message``."""
    file = tmp_path / "queues.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_fleet(file)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}:") for line in lines), lines
    return [line.removeprefix(f"{file}:") for line in lines]


def refusal(file: Path) -> str:
    """What a file is refused with, "" when it is accepted; any error but ConfigError comes through."""
    try:
        load_fleet(file)
    except ConfigError as error:
        return str(error)
    return ""


def line_of(text: str, fragment: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if fragment in line)


def test_the_default_fleet() -> None:
    fleet = load_fleet()
    assert fleet.queues == ("minilm", "spacy", "distilbert", "prophet")
    assert fleet.images["ml"].consumed(gpu=False) == ("prophet",)
    assert fleet.images["ml"].consumed(gpu=True) == ("prophet", "minilm", "distilbert")
    assert fleet.model_storage.l1_memory.size == 2_000_000_000
    assert fleet.memory_config.shared_memory == 512_000_000
    assert fleet.storage_config.model_store.cleanup_threshold == 0.85


def test_a_gpu_has_limits_of_its_own_where_they_are_declared() -> None:
    shared = Batching(max_items=8, max_padded_tokens=100, learn=False)
    assert shared.on("cuda") is shared
    declared = shared.model_copy(update={"gpu": GpuBatching(max_items=9_000, max_padded_tokens=10**6)})
    assert declared.on("cpu") is declared
    for device in ("cuda", "cuda:1"):
        limits = declared.on(device)
        assert (limits.max_items, limits.max_padded_tokens, limits.learn) == (9_000, 10**6, False)
    minilm = load_fleet().models["minilm"].batching
    assert minilm.on("cuda").max_padded_tokens > 8 * minilm.on("cpu").max_padded_tokens


def test_the_light_package_names_the_workers_adapters() -> None:
    assert set(ADAPTERS) == set(ADAPTER_TABLE)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    queue: echo", "    qeueue: echo", "models.echo.qeueue: unknown key; did you mean 'queue'?"),
        ("    adapter: echo", "    adapter: ecko", "models.echo.adapter: unknown adapter 'ecko'; did you mean 'echo'?"),
        ("annotate]", "anotate]", "models.echo.tasks[1]: unknown task 'anotate'; did you mean 'annotate'?"),
        ("images: [nlp]", "images: [nlpp]", "models.echo.images[0]: unknown image 'nlpp'; did you mean 'nlp'?"),
        ("    queue: echo", "    queue: ecko", "models.echo.queue: no image serves queue 'ecko'; did you mean 'echo'?"),
        ("queues: [echo]", "queues: [ecco]", "images.nlp.queues[0]: no model has queue 'ecco'; did you mean 'echo'?"),
        ("    cpus: 1", "    cpus: four", "images.nlp.cpus: expected a number, got text 'four'"),
        ("    cpus: 1", '    cpus: "4"', "images.nlp.cpus: expected a number, got text '4'"),
        ("    cpus: 1", "    cpus: .nan", "images.nlp.cpus: expected a finite number, got nan"),
        ("    cpus: 1", "    cpus: -1", "images.nlp.cpus: must be greater than 0, got -1"),
        ("memory: 1GB", "memory: 1G", "images.nlp.memory: '1G' is not a size; write it like '512MB' or '2GB'"),
        ("memory: 1GB", "memory: true", "images.nlp.memory: expected a whole number, got true"),
        ("memory: 1GB", "memry: 1GB", "images.nlp.memry: unknown key; did you mean 'memory'?"),
        ("queues: [echo]", "queues: echo", "images.nlp.queues: expected a list, got text 'echo'"),
        ("tasks: [embed, annotate]", "tasks: []", "models.echo.tasks: must not be empty"),
        ("  nlp:", "  NLP:", "images.NLP: 'NLP' is not a name: a lower-case letter"),
        ("version: 1", "version: 2", "version: expected 1, got 2"),
        ("version: 1", "vers: 1", "vers: unknown key; did you mean 'version'?"),
        ('source: "builtin:echo"', "source: http://u:hunter2@h", "models.echo.source: a source begins with one of"),
        ("    queue: echo", "    queue: echo\n    load: lasy", "models.echo.load: expected 'pinned' or 'lazy'"),
        ("    queue: echo", "    queue: echo\n    children: 1.0", "models.echo.children: expected a whole number"),
        ("    queue: echo", "    queue: echo\n    limits: 7", "models.echo.limits: expected a mapping, got 7"),
        ("    queue: echo", "    queue: echo\n    batching: {max_item: 1}", "did you mean 'max_items'"),
        (
            "    queue: echo",
            "    queue: echo\n    batching: {gpu: {max_item: 1}}",
            "models.echo.batching.gpu.max_item: unknown key; did you mean 'max_items'?",
        ),
        (
            "    queue: echo",
            "    queue: echo\n    batching: {gpu: {max_items: 0}}",
            "models.echo.batching.gpu.max_items: must be greater than or equal to 1, got 0",
        ),
        ("    queue: echo", "    queue: echo\n    8: x", "models.echo: a key is not text; put it in quotes"),
        ("    queue: echo", "    queue: !!python/name:os.system x", "models.echo.queue: not a value of its tag"),
        ("    queue: echo", "    queue: echo\n    queue: b", "models.echo.queue: duplicate key; it is first on line 7"),
        ("    cpus: 1", "    cpus: *one", "not valid YAML: found undefined alias 'one'"),
        ("    cpus: 1", "    cpus: [1", "not valid YAML"),
    ],
)
def test_a_slip_is_named_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = SMALL.replace(old, new, 1)
    problems = refused(text, tmp_path)
    assert any(said in problem for problem in problems), problems
    assert "hunter2" not in "".join(problems)
    if "not valid YAML" not in said:
        line = line_of(text, new.splitlines()[-1])
        assert any(problem.startswith(f"{line}: ") and said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("warming", "said"),
    [
        ('{schedule: "61 * * * *"}', "15: cache_warming.schedule: minute '61' is not within 0 to 59"),
        ('{schedule: "hourly"}', "15: cache_warming.schedule: 'hourly' has 1 fields"),
        ("{schedule: 5}", "15: cache_warming.schedule: expected text"),
        ("{models: 2}", "15: cache_warming.schedule: missing"),
        ('{schedule: "0 * * * *", input: 5}', "15: cache_warming.input: unknown key; did you mean 'inputs'"),
        ('{schedule: "0 * * * *", models: 0}', "15: cache_warming.models: must be greater than or equal to 1"),
        ('{schedule: "0 * * * *", time_limit_s: "60"}', "15: cache_warming.time_limit_s: "),
    ],
)
def test_a_slip_in_the_schedule_of_warming(tmp_path: Path, warming: str, said: str) -> None:
    [problem] = refused(f"{SMALL}cache_warming: {warming}\n", tmp_path)
    assert problem.startswith(said)


def test_warming_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert load_fleet().cache_warming is None
    file = tmp_path / "queues.yaml"
    file.write_text(f'{SMALL}cache_warming: {{schedule: "*/5 * * * mon-fri"}}\n', encoding="utf-8")
    warming = load_fleet(file).cache_warming
    assert warming is not None
    assert (warming.models, warming.inputs, warming.time_limit_s) == (3, 1_000, 60.0)


def test_two_models_on_one_alias(tmp_path: Path) -> None:
    text = SMALL.replace("images:\n  nlp:", '  echo:\n    source: "builtin:two"\nimages:\n  nlp:')
    assert refused(text, tmp_path) == ["9: models.echo: duplicate key; it is first on line 3"]


def test_every_problem_is_listed_in_the_files_order(tmp_path: Path) -> None:
    text = SMALL.replace("version: 1", "version: one").replace("    queue: echo\n", "").replace("cpus: 1", "cpu: 1")
    problems = refused(text, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["1", "3", "9", "10", "11"]
    assert "3: models.echo.queue: missing" in problems
    assert "11: images.nlp.cpu: unknown key; did you mean 'cpus'?" in problems


def test_a_queue_that_an_image_consumes_without_its_model(tmp_path: Path) -> None:
    image = "  ml:\n    queues: [echo]\n    cpus: 1\n    memory: 1GB\n    storage: 1GB\n"
    (problem,) = refused(SMALL + image, tmp_path)
    assert problem.startswith("16: images.ml.queues[0]: the image consumes queue 'echo' but does not hold model 'echo'")


def test_a_queue_that_one_of_the_models_images_does_not_serve(tmp_path: Path) -> None:
    text = SMALL.replace("images: [nlp]", "images: [nlp, ml]") + "  ml: {cpus: 1, memory: 1GB, storage: 1GB}\n"
    (problem,) = refused(text, tmp_path)
    assert problem.startswith("8: models.echo.images[1]: image 'ml' does not serve queue 'echo'")


def test_the_constructor_refuses_disagreements_too() -> None:
    raw = yaml.safe_load(SMALL)
    raw["models"]["echo"]["queue"] = "other"
    with pytest.raises(ValueError, match=r"models\.echo\.queue: no image serves queue 'other'"):
        FleetConfig.model_validate(raw)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = SMALL.replace("  echo:\n", "  echo: &echo\n").replace(
        "images:\n  nlp:", "  second:\n    <<: *echo\n    tasks: [classify]\nimages:\n  nlp:"
    )
    file = tmp_path / "queues.yaml"
    file.write_text(text)
    fleet = load_fleet(file)
    assert fleet.models["second"].tasks == ("classify",)
    assert fleet.models["second"].queue == "echo"
    assert yaml.safe_load(text)["models"]["second"]["adapter"] == fleet.models["second"].adapter


def test_a_slip_in_a_merged_part_is_named_where_it_stands(tmp_path: Path) -> None:
    text = SMALL.replace("  echo:\n", "  echo: &echo\n    lod: lazy\n").replace(
        "images:\n  nlp:", "  second:\n    <<: [*echo]\nimages:\n  nlp:"
    )
    assert refused(text, tmp_path) == [
        "4: models.echo.lod: unknown key; did you mean 'load'?",
        "4: models.second.lod: unknown key; did you mean 'load'?",
    ]


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert any("aliases expanded" in problem for problem in refused(bomb, tmp_path))


def test_a_merge_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert any("aliases expanded" in problem for problem in refused(bomb, tmp_path))


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "[" * 5_000, "{a: " * 100 + "}" * 100]
)
def test_endless_nesting_is_refused(tmp_path: Path, text: str) -> None:
    assert any("nested" in problem or "values" in problem for problem in refused(text, tmp_path))


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "queues.yaml"
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match=r"larger than 1,048,576 bytes"):
        load_fleet(file)


@pytest.mark.parametrize("name", ["absent.yaml", ".", "nul\0.yaml"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_fleet(tmp_path / name)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_bytes(b"version: 1\nx: \xff\n")
    with pytest.raises(ConfigError, match=r"q\.yaml:2: not UTF-8"):
        load_fleet(tmp_path / "q.yaml")


def test_an_empty_file(tmp_path: Path) -> None:
    assert refused("", tmp_path) == ["1: expected a mapping, got nothing"]


def _mutate(text: str, edits: list[tuple[int, int, str]]) -> str:
    for at, length, new in edits:
        at %= len(text) + 1
        text = text[:at] + new + text[at + length :]
    return text


EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.integers(0, 40),
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(["\n", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "~", "1e999", "0x_",
                             '"\\ud800"', '"\\UFFFFFFFF"', "9" * 5_000, "\t", "'", "%", "true", "? ", "|", "---\n"]),
        ),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
@example(edits=[(0, 10, "version: " + "9" * 5_000)])
@example(edits=[(0, 10, '"\\UFFFFFFFF": 1')])
def test_a_mutated_file_loads_or_is_refused_and_nothing_else(tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    file = tmp_path / "queues.yaml"
    file.write_text(_mutate(DEFAULT, edits), encoding="utf-8", errors="surrogatepass", newline="")
    said = refusal(file)
    said.encode()  # fit for a terminal
    assert not said or re.match(rf"{re.escape(str(file))}:\d+: ", said)


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSONISH)
def test_any_value_in_any_place_loads_or_is_refused(tmp_path: Path, data: st.DataObject, value: object) -> None:
    raw = yaml.safe_load(DEFAULT)
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    file = tmp_path / "queues.yaml"
    file.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    refusal(file).encode()


# ------------------------------------------------------------------------------------------ models and settings


def test_models_are_found_by_alias_or_by_task() -> None:
    fleet = load_fleet()
    assert fleet.model(None, "classify")[0] == "sentiment"
    assert fleet.model("minilm", "embed")[0] == "minilm"
    with pytest.raises(UnknownModel, match="did you mean 'minilm'"):
        fleet.model("minilmm", "embed")
    with pytest.raises(UnknownModel, match="does not serve task 'forecast'"):
        fleet.model("minilm", "forecast")


def test_settings_name_the_variable_and_never_its_value() -> None:
    env = {
        "CORTEX_BROKER_URL": "http://:hunter2@h",
        "CORTEX_CONNECT_TIMEOUT_S": "hunter2",
        "CORTEX_POOL": "hunter2",
        "CORTEX_RESULT_URL": "redis://u:hunter2@h:port",
    }
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(env)
    message = str(caught.value)
    assert "hunter2" not in message
    assert "hunter2" not in repr(caught.value)
    assert {line.split(":")[0] for line in message.splitlines()} == set(env)


def test_settings_have_defaults_and_read_the_environment() -> None:
    settings = Settings.from_env({"CORTEX_BROKER_URL": "rediss://u:p@h:7000/1", "CORTEX_RESULT_URL": "", "HOME": "/"})
    assert settings.broker == settings.results == "rediss://u:p@h:7000/1"
    assert "p@h" not in repr(settings)
    assert Settings.from_env({}).broker == "redis://127.0.0.1:6379/0"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("rediss://:hunter2@h/0?ssl_cert_req=none", "unknown parameter 'ssl_cert_req'"),
        ("rediss://:hunter2@h/0?ssl_check_hostname=false", "unknown parameter 'ssl_check_hostname'"),
        ("rediss://:hunter2@h/0?ssl_cert_reqs=CERT_NONE", "expected one of required, optional, none"),
        ("rediss://:hunter2@h/0?ssl_cert_reqs=", "expected one of required, optional, none"),
        ("redis://:hunter2@h/0?ssl_ca_certs=/ca.pem", "ssl_ca_certs needs a rediss:// URL"),
    ],
)
def test_tls_parameters_that_would_not_mean_what_they_say(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({"CORTEX_RESULT_URL": url})
    assert said in str(caught.value)
    assert "CORTEX_RESULT_URL" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:hunter2@h:6379/0", "redis://:***@h:6379/0"),
        ("rediss://user:hunter2@h:6379/0", "rediss://user:***@h:6379/0"),
        ("redis://user@h:6379", "redis://user@h:6379"),
        ("redis://h:6379/0?password=hunter2&db=1", "redis://h:6379/0?password=***&db=1"),
        ("redis://:hun/ter2@h:6379", "redis://***@h:6379"),
        ("redis://:hun?ter2@h:6379", "redis://***@h:6379"),
        ("redis://:hun#ter2@h:6379", "redis://***@h:6379"),
        ("redis://:hun@/ter2@h:6379", "redis://***@h:6379"),
        ("redis://[hunter2", "redis://***"),
        ("redis://h:hunter2", "redis://***"),
    ],
)
def test_a_masked_url(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@given(st.text(alphabet="ab:/?#@[]%&=.0", max_size=24))
def test_a_masked_url_never_holds_the_password(noise: str) -> None:
    assert "hunter2" not in mask_url(f"redis://:hunter2{noise}@h:6379/0")
    assert "hunter2" not in mask_url(f"redis://u:{noise}hunter2@h:6379/0")


@pytest.mark.parametrize(
    ("adapter", "choice", "cached"),
    [
        ("sentence_transformers", "auto", True),
        ("echo", "auto", False),
        ("echo", "always", True),
        ("sentence_transformers", "never", False),
    ],
)
def test_what_answers_for_nothing_is_not_cached_unless_asked_for(adapter: str, choice: str, cached: bool) -> None:
    model = {"source": "builtin:echo", "tasks": ["embed"], "queue": "q", "images": ["i"]}
    given = {**model, "adapter": adapter, "backend": "native" if adapter == "echo" else "torch", "cache": choice}
    assert ModelConfig.model_validate(given).cached is cached


@pytest.mark.parametrize(
    ("whole", "part", "answers", "weights"),
    [(10**10, None, 5 * 10**9, 5 * 10**9), (10**10, 10**9, 10**9, 9 * 10**9), (9, 10, 9, 0), (0, None, 0, 0)],
)
def test_answers_and_weights_share_the_room_in_redis(whole: int, part: int | None, answers: int, weights: int) -> None:
    fleet = load_fleet()
    storage = fleet.model_storage
    tier = storage.l2_redis.model_copy(update={"size": whole})
    given = fleet.model_copy(
        update={
            "cache": fleet.cache.model_copy(update={"max_size": part}),
            "model_storage": storage.model_copy(update={"l2_redis": tier}),
        }
    )
    assert (given.answers_max_bytes, given.weights_max_bytes) == (answers, weights)
