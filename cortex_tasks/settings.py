"""The CORTEX_* environment variables. URLs may hold passwords: they are secrets, and messages show them masked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from cortex_tasks.catalog import nearest
from cortex_tasks.config_problems import reason
from cortex_tasks.errors import ConfigError

__all__ = ["Settings", "mask_url", "tls_options"]

_CERT_REQS: Final = ("required", "optional", "none")
#: What redis-py, kombu and Celery's backend all understand, and mean the same by.
_TLS: Final = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
#: What else a URL may set, as redis-py reads it. Not what would break Cortex: bytes that are decoded to text, a pool
#: that is smaller than what asks for its connections, more retries.
_OPTIONS: Final[Mapping[str, Callable[[str], object]]] = {
    "client_name": str,
    "db": int,
    "health_check_interval": int,
    "password": str,
    "protocol": int,
    "socket_connect_timeout": float,
    "socket_keepalive": str,
    "socket_read_size": int,
    "socket_timeout": float,
    "username": str,
}
#: Whose values a message may show.
_SHOWN: Final = {*_OPTIONS, *_TLS} - {"password"}


def mask_url(url: str) -> str:
    """A Redis URL fit for a message: the password (in the authority or the query) replaced by ``***``."""
    try:
        parts = urlsplit(url)
        readable = parts.port != 0 and bool(parts.hostname or not parts.netloc)
    except ValueError:
        readable = False
    if not readable or "@" in parts.path + parts.query + parts.fragment:
        # Perhaps an unescaped / ? or # in the password: only what follows the last @ is surely none of it.
        scheme, _, rest = url.partition("://")
        _, at, host = rest.rpartition("@")
        return f"{scheme if rest else ''}://***{at}{host if at else ''}"
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    # A name that is misspelt may be that of a password.
    query = re.sub(r"([^&=]*)=[^&]*", lambda pair: pair[0] if pair[1] in _SHOWN else f"{pair[1]}=***", parts.query)
    return urlunsplit((parts.scheme, f"{name}{':***' if colon else ''}{at}{host}", parts.path, query, ""))


def tls_options(url: str) -> dict[str, str] | None:
    """The ``ssl_`` options of a ``rediss://`` URL; certificates are verified unless it says otherwise. None for
    ``redis://``. Raises ValueError, without the URL, on options that not all of Cortex's parts would honour."""
    parts = urlsplit(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    given = {name: values[-1] for name, values in query.items() if name.startswith("ssl_")}
    if parts.scheme != "rediss":
        if given:
            raise ValueError(f"{sorted(given)[0][:40]} needs a rediss:// URL")
        return None
    for name in given:
        if name not in _TLS:
            raise ValueError(f"unknown parameter {name[:40]!r}; expected one of {', '.join(_TLS)}")
    options = {"ssl_cert_reqs": "required", **given}
    if options["ssl_cert_reqs"] not in _CERT_REQS:
        raise ValueError(f"ssl_cert_reqs: expected one of {', '.join(_CERT_REQS)}")
    return options


def _check_options(query: str) -> None:
    """Raises ValueError, which names the parameter but shows no value, on what is no parameter of Cortex."""
    for name, values in parse_qs(query, keep_blank_values=True).items():
        if name.startswith("ssl_"):
            continue
        if name not in _OPTIONS:
            raise ValueError(f"unknown parameter {name[:40]!r}{nearest(name, _OPTIONS)}")
        try:
            for value in values:
                _OPTIONS[name](value)
        except ValueError:
            raise ValueError(f"parameter {name!r} must be a number") from None


def _redis_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        # An @ behind the host is that of a password that is not escaped. Sockets want a host's name as IDNA.
        usable = "@" not in parts.path + parts.query + parts.fragment and bool((parts.hostname or "").encode("idna"))
        usable = usable and parts.scheme in ("redis", "rediss") and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("expected redis://[user:password@]host:port/db or rediss://...; escape / ? # @ in a password")
    tls_options(url)
    _check_options(parts.query)
    return value


def _read_secret(variable: str, file: Path) -> str:
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        # A UnicodeDecodeError would show a byte of the secret.
        raise ConfigError(f"{variable}: cannot read {file}: {getattr(error, 'strerror', None) or 'not text'}") from None
    if not password:
        raise ConfigError(f"{variable}: {file} is empty")
    return password


def _with_password(url: SecretStr, password: str) -> SecretStr:
    parts = urlsplit(url.get_secret_value())
    user, _, host = parts.netloc.rpartition("@")
    return SecretStr(urlunsplit(parts._replace(netloc=f"{user.rstrip(':')}:{quote(password, safe='')}@{host}")))


RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]


class Settings(BaseModel):
    """The CORTEX_* environment. URLs may hold passwords, so they are secrets; print ``mask_url`` of them."""

    # A ValidationError would show a URL with its password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    broker_url: RedisUrl = SecretStr("redis://127.0.0.1:6379/0")
    #: Where answers are kept; None: the broker's.
    result_url: RedisUrl | None = None
    #: The result cache; None: where answers are kept.
    cache_url: RedisUrl | None = None
    #: Files that hold the passwords of these URLs, where the URLs have none.
    broker_password_file: Path | None = None
    result_password_file: Path | None = None
    cache_password_file: Path | None = None
    queues_file: Path | None = None
    #: The image this worker runs as; None: deduced from its queues.
    image: str | None = None
    models_dir: Path | None = None
    #: Where built engines are kept; None: cache_store.path of queues.yaml.
    cache_dir: Path | None = None
    #: Forge's registry of models, an address that fsspec reads; it may hold a password.
    forge_url: SecretStr | None = None
    connect_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    #: Hooks into Celery and kombu; "stock" switches one back.
    pool: Literal["cortex", "stock"] = "cortex"
    transport: Literal["cortex", "stock"] = "cortex"
    backend: Literal["cortex", "stock"] = "cortex"
    tracer: Literal["cortex", "stock"] = "cortex"
    #: The same for clients: how jobs are published, and how answers come back.
    publish: Literal["cortex", "stock"] = "cortex"
    replies: Literal["cortex", "stock"] = "cortex"
    #: How long a warm shutdown goes on with jobs that have started.
    stop_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    #: Whether a worker moves its objects to huge pages, where the kernel has them.
    huge_pages: bool = True

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read CORTEX_<FIELD> for each field; an empty variable counts as absent.

        Raises ConfigError that names each bad variable, never its value.
        """
        env = os.environ if environ is None else environ
        given = {name: text for name in cls.model_fields if (text := env.get(f"CORTEX_{name.upper()}"))}
        try:
            return cls.model_validate(given)._with_passwords()
        except ValidationError as error:
            lines = [f"CORTEX_{str(e['loc'][0]).upper()}: {reason(e)}" for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines))

    def _with_passwords(self) -> Settings:
        """The URLs completed from the password files. Raises ConfigError, which names the variable and its file."""
        complete: dict[str, SecretStr] = {}
        for name in ("broker", "result", "cache"):
            url, file = getattr(self, f"{name}_url"), getattr(self, f"{name}_password_file")
            if file is None:
                continue
            variable = f"CORTEX_{name.upper()}_PASSWORD_FILE"
            if url is None:
                raise ConfigError(f"{variable}: needs CORTEX_{name.upper()}_URL")
            password = _read_secret(variable, file)
            if urlsplit(url.get_secret_value()).password is None:
                complete[f"{name}_url"] = _with_password(url, password)
        return self.model_copy(update=complete)

    @property
    def results(self) -> str:
        return (self.result_url or self.broker_url).get_secret_value()

    @property
    def cache(self) -> str:
        return (self.cache_url or self.result_url or self.broker_url).get_secret_value()

    @property
    def forge(self) -> str | None:
        return self.forge_url.get_secret_value() if self.forge_url is not None else None

    @property
    def broker(self) -> str:
        return self.broker_url.get_secret_value()
