"""Passwords that come from files."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from cortex_tasks.errors import ConfigError
from cortex_tasks.settings import Settings, mask_url


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text("s3cret/@#\n", encoding="utf-8")
    return file


def test_a_password_completes_the_url_that_has_none(secret: Path) -> None:
    env = {
        "CORTEX_BROKER_URL": "redis://broker:6379/0",
        "CORTEX_BROKER_PASSWORD_FILE": str(secret),
        "CORTEX_CACHE_URL": "rediss://me@cache:7000/1?ssl_cert_reqs=none",
        "CORTEX_CACHE_PASSWORD_FILE": str(secret),
    }
    settings = Settings.from_env(env)
    assert settings.broker == "redis://:s3cret%2F%40%23@broker:6379/0"
    # Answers are kept at the broker, with its password.
    assert settings.results == settings.broker
    assert settings.cache == "rediss://me:s3cret%2F%40%23@cache:7000/1?ssl_cert_reqs=none"
    assert "s3cret" not in repr(settings) + mask_url(settings.broker) + mask_url(settings.cache)


def test_a_password_in_the_url_wins(secret: Path) -> None:
    env = {"CORTEX_BROKER_URL": "redis://:own@broker:6379/0", "CORTEX_BROKER_PASSWORD_FILE": str(secret)}
    assert Settings.from_env(env).broker == "redis://:own@broker:6379/0"


def test_the_default_broker_may_have_a_password(secret: Path) -> None:
    settings = Settings.from_env({"CORTEX_BROKER_PASSWORD_FILE": str(secret)})
    assert settings.broker == "redis://:s3cret%2F%40%23@127.0.0.1:6379/0"


def test_what_is_wrong_with_a_file_is_told_and_no_more(tmp_path: Path, secret: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00secret")
    for file, reason in ((empty, "is empty"), (binary, "not text"), (tmp_path / "none", "No such file")):
        with pytest.raises(ConfigError, match="CORTEX_BROKER_PASSWORD_FILE") as caught:
            Settings.from_env({"CORTEX_BROKER_PASSWORD_FILE": str(file)})
        assert reason in str(caught.value)
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="needs CORTEX_CACHE_URL"):
        Settings.from_env({"CORTEX_CACHE_PASSWORD_FILE": str(secret)})


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:s3cret@h/0?socket_timout=5", "unknown parameter 'socket_timout'; did you mean 'socket_timeout'"),
        ("redis://:s3cret@h/0?decode_responses=True", "unknown parameter 'decode_responses'"),
        ("redis://:s3cret@h/0?max_connections=1", "unknown parameter 'max_connections'"),
        ("redis://:s3cret@h/0?db=1&timeout=1", "unknown parameter 'timeout'"),
        ("redis://h/0?pasword=s3cret", "unknown parameter 'pasword'; did you mean 'password'"),
        ("redis://h/0?socket_timeout=soon", "parameter 'socket_timeout' must be a number"),
        ("redis://h/0?db=", "parameter 'db' must be a number"),
        ("rediss://:s3cret@h/0?ssl_cert_reqs=none&socket_timout=5", "unknown parameter 'socket_timout'"),
        # A password that is not escaped passes for a port and a parameter; hosts that no socket takes.
        ("redis://user:12?s3cret=1@h:6379", "escape / ? # @"),
        ("redis://user:12/s3cret@h:6379", "escape / ? # @"),
        ("redis://user:12#s3cret@h:6379", "escape / ? # @"),
        ("redis://:s3cret@redis..svc:6379/0", "expected redis://"),
        (f"redis://:s3cret@{'a' * 64}:6379/0", "expected redis://"),
    ],
)
def test_a_url_that_redis_py_would_fail_on_later_is_refused_at_once(url: str, said: str) -> None:
    for name in ("BROKER", "RESULT", "CACHE"):
        with pytest.raises(ConfigError, match=f"CORTEX_{name}_URL") as caught:
            Settings.from_env({f"CORTEX_{name}_URL": url})
        assert said in str(caught.value)
        assert "s3cret" not in str(caught.value) + mask_url(url)


def test_a_url_may_set_what_changes_nothing_that_cortex_needs() -> None:
    query = (
        "client_name=me&db=1&health_check_interval=9&password=x&protocol=2&socket_connect_timeout=0.5"
        "&socket_keepalive=1&socket_read_size=4096&socket_timeout=5&username=default"
    )
    url = f"redis://h/0?{query}"
    assert Settings.from_env({"CORTEX_BROKER_URL": url}).broker == url
    assert mask_url(url) == url.replace("password=x", "password=***")


@pytest.mark.parametrize("url", ["redis://:s3cret@host:0/0", "http://:s3cret@host", "redis://:s3cr/et@host:1"])
def test_what_is_wrong_with_a_url_is_told_without_the_url(url: str) -> None:
    with pytest.raises(ValidationError, match="escape / ") as caught:
        Settings(broker_url=SecretStr(url))
    with pytest.raises(ValidationError) as plain:
        Settings.model_validate({"broker_url": url, "no such setting": url})
    assert "s3cr" not in str(caught.value) + repr(caught.value) + str(plain.value) + repr(plain.value)
