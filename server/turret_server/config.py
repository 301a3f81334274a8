"""The settings of a server: `ServerConfig`, which validates itself, and where settings are read from.

A setting is declared once, with its field. `--max-queue N` on the command line, `TURRET_MAX_QUEUE` in the
environment and `max_queue` in the TOML file of `--config` are the same setting; the command line takes
precedence over the environment, the environment over the file, and the file over the default.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from turret_server.errors import ConfigError

NAME_MARK = "{name}"
"""Stands for an adapter's name in `lazy_source`."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of adapters, tenants and pinned prompts."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(i?B)?", re.IGNORECASE)
_SWITCH = {"true": True, "1": True, "false": False, "0": False}

_PREFIX = "TURRET_"
# The client's own, and the one that names the file.
_OTHER_VARIABLES = {"TURRET_SERVER", "TURRET_API_KEY", "TURRET_CONFIG"}
# Kubernetes sets these in every pod for a Service that is called turret, or turret-something.
_KUBERNETES = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


class Group(StrEnum):
    """The sections of `turret serve --help`."""

    MODEL = "Model and adapters"
    MEMORY = "Memory and disk"
    NETWORK = "Network"
    SECURITY = "Security"
    SCHEDULING = "Scheduling"
    LOGGING = "Logging"


class Size(NamedTuple):
    """A number of bytes, or a fraction of what is free."""

    number: float
    is_fraction: bool


def parse_size(text: str) -> Size | None:
    """A size such as "2GiB", or a fraction such as "0.5"; None for anything else, and for 0."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match["number"]):
        return None
    number, unit = float(match["number"]), match["unit"].upper()
    return Size(number * _UNITS[unit], is_fraction=not unit and number <= 1)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        ValueError: the address is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT, found {address!r}")
    return host, int(port)


class _Rule(NamedTuple):
    """Which values are allowed: in words, for messages, and as a predicate."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_address(value: str) -> bool:
    try:
        split_address(value)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    host = split_address(address)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_lazy_source(value: str) -> bool:
    return value.count(NAME_MARK) == 1 and (value.startswith("/") or "://" in value)


_ANY = _Rule("a string that is not empty", bool)
_COUNT = _Rule("an integer of at least 1", lambda value: value >= 1)
_POSITIVE = _Rule("a number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Rule("a number of at least 0", lambda value: 0 <= value < math.inf)
_ADDRESS = _Rule("HOST:PORT, such as 127.0.0.1:50051", _is_address)
_ORIGIN = _Rule(
    'an origin such as https://chat.example.com, or "*"',
    lambda value: value == "*" or re.fullmatch(r"https?://[^/\s]+", value) is not None,
)
_DEVICE = _Rule(
    "auto, cpu, cuda, or a GPU such as cuda:1",
    lambda value: re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", value) is not None,
)
_SIZE_OR_FRACTION = _Rule(
    "a size such as 2GiB, or a fraction of the free memory such as 0.5",
    lambda value: parse_size(value) is not None,
)
_ABSOLUTE_SIZE = _Rule(
    "a size such as 50GiB", lambda value: (size := parse_size(value)) is not None and not size.is_fraction
)
_FILE = _Rule("an existing file", lambda path: path.exists() and not path.is_dir())
_FOLDER = _Rule("an existing folder", Path.is_dir)
_NEW_FOLDER = _Rule("a folder, which need not exist", lambda path: path.is_dir() or not path.exists())
_ADAPTER_NAME = _Rule(
    "1 to 128 of the characters a-z A-Z 0-9 . _ -, the first a letter or a digit",
    lambda name: NAME.fullmatch(name) is not None,
)
_LAZY_SOURCE = _Rule(
    f"an absolute path or a URL that contains {NAME_MARK} once, such as hf://owner/{NAME_MARK}",
    _is_lazy_source,
)
_FUNCTION = _Rule("MODULE:FUNCTION, such as my_auth:tenant_of", lambda value: all(value.partition(":")[::2]))


def default_cache() -> Path:
    """The folder of quantised weights: `$XDG_CACHE_HOME/turret`, or `~/.cache/turret`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turret"


def default_store() -> Path:
    """The folder of adapters: `$XDG_DATA_HOME/turret`, or `~/.local/share/turret`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "turret"


class _About(NamedTuple):
    """What a field of `ServerConfig` carries. `unset` is the word by which a user says None."""

    group: Group
    metavar: str
    help: str
    rule: _Rule = _ANY
    default_text: str | None = None
    unset: str | None = None


def _about(*values: Any, **more: Any) -> dict[str, _About]:
    return {"about": _About(*values, **more)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What `turret serve` is started with; `SETTINGS` describes every field.

    Raises:
        ConfigError: a value is not allowed, or does not go with another. The message names the flag; see
            `GivenSettings.named_as_given`.
    """

    model: str = field(
        metadata=_about(Group.MODEL, "PATH_OR_HUB_ID", "Base model: a folder, or an id on the Hub. Required.")
    )
    device: str = field(
        default="auto",
        metadata=_about(
            Group.MODEL,
            "DEVICE",
            'Device to compute on: "cpu", "cuda", which is the first GPU, or another GPU such as "cuda:1". '
            '"auto" is the first GPU if there is one.',
            _DEVICE,
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=_about(
            Group.MODEL, "DTYPE", "Data type of activations. The base model's weights are NF4 in any case."
        ),
    )
    max_context: int | None = field(
        default=None,
        metadata=_about(
            Group.MODEL,
            "TOKENS",
            "Maximum tokens of a prompt and its answer. A model whose rotary embedding changes for long "
            "sequences (longrope, dynamic) serves up to the length at which it does.",
            _COUNT,
            default_text="the model's context",
        ),
    )
    chat_template: Path | None = field(
        default=None,
        metadata=_about(
            Group.MODEL,
            "FILE",
            "Chat template (Jinja) of the model, in place of the one that it has, if any. Adapters whose "
            "folders have another one use that.",
            _FILE,
            default_text="the model's chat template",
        ),
    )
    adapters: Path | None = field(
        default=None,
        metadata=_about(
            Group.MODEL,
            "DIR",
            "Load every subfolder of DIR at the start, as the adapter of that name, whatever the name served "
            "before.",
            _FOLDER,
        ),
    )
    watch: bool = field(
        default=False,
        metadata=_about(
            Group.MODEL,
            "",
            "Load, replace and unload adapters when their folders in --adapters appear, change or vanish.",
        ),
    )
    pin: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            Group.MODEL,
            "NAME",
            "Keep this adapter in the arena, whichever revision its name serves; repeatable. The server "
            "reports SERVING once all pinned adapters are there.",
            _ADAPTER_NAME,
        ),
    )
    lazy_source: str | None = field(
        default=None,
        metadata=_about(
            Group.MODEL,
            "DIR_OR_URL",
            "Load an adapter that a request names and nobody has loaded from here: an absolute path or a "
            'URL that contains {name}, such as "hf://owner/{name}".',
            _LAZY_SOURCE,
        ),
    )
    memory: str | None = field(
        default=None,
        metadata=_about(
            Group.MEMORY,
            "SIZE",
            'Size of the arena, which holds KV blocks and adapters on the device: "2GiB", or a fraction of '
            'the free memory such as 0.5. "auto" is 0.8 on a GPU; on a CPU it is 0.25, but at most 4GiB.',
            _SIZE_OR_FRACTION,
            unset="auto",
        ),
    )
    host_memory: str | None = field(
        default=None,
        metadata=_about(
            Group.MEMORY,
            "SIZE",
            "Host-memory budget for adapters that are not in the arena, written like --memory. Adapters "
            'beyond it are read from disk when a request names them. "auto" is 0.25.',
            _SIZE_OR_FRACTION,
            unset="auto",
        ),
    )
    store: Path = field(
        default_factory=default_store,
        metadata=_about(
            Group.MEMORY,
            "DIR",
            "Folder of adapters and their names: after a restart the same names serve the same revisions. A "
            "store belongs to one server; a second server on it is refused at its start.",
            _NEW_FOLDER,
            default_text="$XDG_DATA_HOME/turret or ~/.local/share/turret",
        ),
    )
    store_size: str | None = field(
        default=None,
        metadata=_about(
            Group.MEMORY,
            "SIZE",
            'Size to keep the store below, such as "50GiB": the least recently used revisions that no name '
            "needs are deleted. Revisions in use may exceed it.",
            _ABSOLUTE_SIZE,
            default_text="no limit",
        ),
    )
    cache: Path = field(
        default_factory=default_cache,
        metadata=_about(
            Group.MEMORY,
            "DIR",
            "Folder of quantised base models, which makes the next start faster.",
            _NEW_FOLDER,
            default_text="$XDG_CACHE_HOME/turret or ~/.cache/turret",
        ),
    )
    listen: str = field(
        default="127.0.0.1:50051",
        metadata=_about(
            Group.NETWORK,
            "HOST:PORT",
            "Address of the gRPC server. Addresses that other machines reach require authentication: see "
            "--tenants.",
            _ADDRESS,
        ),
    )
    http: str | None = field(
        default="127.0.0.1:8000",
        metadata=_about(
            Group.NETWORK,
            "HOST:PORT",
            'Address of the HTTP server, which has the API of OpenAI; "none" switches it off. Authentication '
            "is as for --listen.",
            _ADDRESS,
            unset="none",
        ),
    )
    http_cors: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            Group.NETWORK,
            "ORIGIN",
            'Web pages of this origin, such as "https://chat.example.com", may call the HTTP server from a '
            'browser; "*" is every origin; repeatable.',
            _ORIGIN,
        ),
    )
    metrics: str | None = field(
        default="127.0.0.1:9090",
        metadata=_about(
            Group.NETWORK,
            "HOST:PORT",
            'Address of the Prometheus endpoint /metrics; "none" switches it off.',
            _ADDRESS,
            unset="none",
        ),
    )
    vllm_metrics: bool = field(
        default=False,
        metadata=_about(
            Group.NETWORK,
            "",
            "Add to the metrics the gauges that routers scrape, with vLLM's names (Gateway API Inference "
            "Extension, llm-d). One of them lists the adapters in the arena by name.",
        ),
    )
    grace: float = field(
        default=30.0,
        metadata=_about(
            Group.NETWORK,
            "SECONDS",
            "Time that in-flight requests get to finish on SIGTERM; new ones are refused, and a second "
            "signal ends it. In Kubernetes, set terminationGracePeriodSeconds 10 s higher.",
            _NOT_NEGATIVE,
        ),
    )
    tenants: Path | None = field(
        default=None,
        metadata=_about(
            Group.SECURITY,
            "FILE",
            "TOML file of tenants with their keys, permissions, weights and limits; it is read again when "
            "it changes. `turret tenants --help` shows an example.",
            _FILE,
        ),
    )
    auth_hook: str | None = field(
        default=None,
        metadata=_about(
            Group.SECURITY,
            "MODULE:FUNCTION",
            "Python function that authenticates a call before keys and certificates are checked: it gets "
            "the call's metadata and the names in the client certificate, and returns a tenant's name or "
            "None. The module is installed or on PYTHONPATH.",
            _FUNCTION,
        ),
    )
    allow_unauthenticated: bool = field(
        default=False,
        metadata=_about(
            Group.SECURITY,
            "",
            "Listen on an address that other machines reach although callers need no key. Use it only "
            "behind a network or a proxy that authenticates.",
        ),
    )
    allow_source: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            Group.SECURITY,
            "DIR_OR_URL",
            'Folder or URL prefix, such as "hf://owner" or "https://models.example.com/", from which '
            "adapters may be loaded besides --adapters; repeatable. Without it, a server on loopback loads "
            "from any folder.",
        ),
    )
    tls_cert: Path | None = field(
        default=None,
        metadata=_about(
            Group.SECURITY,
            "FILE",
            "PEM file of the server's certificate chain. A renewed file applies to new connections.",
            _FILE,
        ),
    )
    tls_key: Path | None = field(
        default=None,
        metadata=_about(
            Group.SECURITY, "FILE", "PEM file of the certificate's private key, unencrypted.", _FILE
        ),
    )
    tls_client_ca: Path | None = field(
        default=None,
        metadata=_about(
            Group.SECURITY,
            "FILE",
            "PEM file of the authority that signs client certificates. With it every client needs one, and "
            "the names in it can be a tenant's identities.",
            _FILE,
        ),
    )
    max_batch_tokens: int = field(
        default=512, metadata=_about(Group.SCHEDULING, "N", "Maximum tokens in one step.", _COUNT)
    )
    max_batch_requests: int = field(
        default=64, metadata=_about(Group.SCHEDULING, "N", "Maximum requests in one step.", _COUNT)
    )
    max_step_seconds: float = field(
        default=0.5,
        metadata=_about(
            Group.SCHEDULING,
            "SECONDS",
            "Target for the longest step: prompts are computed in chunks that take no longer, so that other "
            "streams go on.",
            _POSITIVE,
        ),
    )
    max_queue: int = field(
        default=1024, metadata=_about(Group.SCHEDULING, "N", "Maximum queued requests per tenant.", _COUNT)
    )
    max_queue_tokens: int = field(
        default=2**20,
        metadata=_about(
            Group.SCHEDULING,
            "N",
            "Maximum tokens, of prompts and to generate, in a tenant's queued requests.",
            _COUNT,
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info",
        metadata=_about(
            Group.LOGGING, "LEVEL", "Lowest level to log. The end of each request is logged at level info."
        ),
    )
    log_format: Literal["human", "json"] = field(
        default="human",
        metadata=_about(Group.LOGGING, "FORMAT", "Log lines for people, or one JSON object per line."),
    )
    usage_log: Path | None = field(
        default=None,
        metadata=_about(
            Group.LOGGING,
            "FILE",
            "Append one JSON object per finished request, for billing; it is on disk before the client gets "
            "its answer. While the file cannot be written, requests are refused.",
        ),
    )
    otel: bool = field(
        default=False,
        metadata=_about(
            Group.LOGGING,
            "",
            "Send a trace of every request over OTLP (gRPC), as the OTEL_* environment variables say. Needs "
            'the extra "otel".',
        ),
    )

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            setting.check(getattr(self, setting.name))
        if self.max_batch_requests > self.max_batch_tokens:
            raise ConfigError(
                f"--max-batch-requests {self.max_batch_requests}: expected at most --max-batch-tokens, which "
                f"is {self.max_batch_tokens}"
            )
        if self.watch and not self.adapters:
            raise ConfigError("--watch: there is no folder to watch; name one with --adapters")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ConfigError("--tls-cert and --tls-key belong together, and --tls-client-ca needs both")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.open_address is None

    @property
    def open_address(self) -> tuple[str, str] | None:
        """The flag and value of an address that other machines reach; None if there is none."""
        addresses = (("--listen", self.listen), ("--http", self.http))
        return next(((flag, each) for flag, each in addresses if each and not _is_loopback(each)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of `ServerConfig` as users see it. `choices` is empty where any text goes."""

    name: str
    group: Group
    metavar: str
    help: str
    kind: type
    choices: tuple[str, ...]
    default_text: str
    unset: str | None
    rule: _Rule

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return _PREFIX + self.name.upper()

    def parse(self, text: str) -> object:
        """The value of a flag or a variable. A list in a variable is separated by commas.

        Raises:
            ConfigError: the text is not of the setting's type.
        """
        if text == self.unset:
            return None
        if self.kind is tuple:
            return tuple(part.strip() for part in text.split(","))
        try:
            return _SWITCH[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            raise self._refusal(text) from None

    def convert(self, value: object) -> object:
        """The value of a key of the TOML file.

        Raises:
            ConfigError: the value is not of the setting's type.
        """
        if value == self.unset and value is not None:
            return None
        if self.kind is tuple and isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        if self.kind is Path and isinstance(value, str):
            return Path(value)
        if self.kind is float and type(value) is int:
            return float(value)
        if type(value) is not self.kind:
            raise self._refusal(value)
        return value

    def check(self, value: Any) -> None:
        """See that a value is allowed.

        Raises:
            ConfigError: it is not.
        """
        if value is None or self.kind is bool:
            return
        for each in value if self.kind is tuple else [value]:
            if not (each in self.choices if self.choices else self.rule.accepts(each)):
                raise self._refusal(each)

    @property
    def allowed(self) -> str:
        """The allowed values in words, for messages."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return " or ".join(filter(None, [", ".join(self.choices[:-1]), self.choices[-1]]))
        return f'{self.rule.allowed}, or "{self.unset}"' if self.unset else self.rule.allowed

    def _refusal(self, value: object) -> ConfigError:
        is_element = self.kind is not tuple or isinstance(value, str)
        allowed = self.allowed if is_element else f"a list of strings, each {self.allowed}"
        return ConfigError(f"{self.flag} {_shown(value)}: expected {allowed}")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or '""'


def _describe(declared: Field[Any], hint: Any) -> Setting:
    about: _About = declared.metadata["about"]
    [hint] = [each for each in get_args(hint) if each is not NoneType] if _is_optional(hint) else [hint]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return Setting(
        name=declared.name,
        group=about.group,
        metavar=about.metavar,
        help=about.help,
        kind=str if choices else get_origin(hint) or hint,
        choices=choices,
        default_text=about.default_text or _default_text(declared.default, about.unset),
        unset=about.unset,
        rule=about.rule,
    )


def _default_text(default: object, unset: str | None) -> str:
    if default is None:
        return unset or ""
    if default is MISSING or default in (False, ()):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _is_optional(hint: Any) -> bool:
    return NoneType in get_args(hint)


_HINTS = get_type_hints(ServerConfig)
SETTINGS = tuple(_describe(declared, _HINTS[declared.name]) for declared in fields(ServerConfig))
_BY_NAME = {setting.name: setting for setting in SETTINGS}
_BY_VARIABLE = {setting.variable: setting for setting in SETTINGS}


class GivenSettings:
    """Settings from the command line, the environment and a file, and in which form each was given."""

    def __init__(self, flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> None:
        """Read all three.

        Args:
            flags: By the settings' names, as texts; repeatable ones as tuples, switches as True.
            environ: The environment. An empty variable counts as not set.
            file: The TOML file, if any.

        Raises:
            ConfigError: the file is not readable, a key or a variable is unknown, or a value has the wrong
                type. The message names the setting in the form in which it was given.
        """
        self._values: dict[str, Any] = {}
        self._given_as: dict[str, str] = {}
        if file:
            self._read_file(file)
        self._read_environment(environ)
        for name, value in flags.items():
            self._take(_BY_NAME[name], _BY_NAME[name].flag, value, _parse_flag)

    def config(self) -> ServerConfig:
        """The validated settings.

        Raises:
            ConfigError: the model is missing, or a value is not allowed.
        """
        if "model" not in self._values:
            raise ConfigError(
                "--model is missing: give it on the command line, as TURRET_MODEL in the environment, or as "
                "model in the file of --config"
            )
        with self.named_as_given():
            return ServerConfig(**self._values)

    @contextmanager
    def named_as_given(self) -> Iterator[None]:
        """Messages of ConfigError name settings by their flags. Where a setting was given as a variable or in
        the file, the message that leaves the block names that.
        """
        try:
            yield
        except ConfigError as error:
            message = re.sub(r"(?<![\w-])--[a-z-]+", self._as_given, str(error))
            raise ConfigError(message, **error.metadata) from error

    def _as_given(self, flag: re.Match[str]) -> str:
        return self._given_as.get(flag[0].removeprefix("--").replace("-", "_"), flag[0])

    def _take(self, setting: Setting, form: str, value: Any, read: Callable[[Setting, Any], object]) -> None:
        self._given_as[setting.name] = form
        with self.named_as_given():
            self._values[setting.name] = read(setting, value)

    def _read_file(self, file: Path) -> None:
        try:
            found = tomllib.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {file}: expected a TOML file; {error}") from error
        for key, value in found.items():
            if key not in _BY_NAME:
                nearest = _nearest(key, _BY_NAME)
                raise ConfigError(f"--config {file}: unknown key {key}; the nearest is {nearest}")
            self._take(_BY_NAME[key], f"{key} ({file})", value, Setting.convert)

    def _read_environment(self, environ: Mapping[str, str]) -> None:
        for variable, text in environ.items():
            if setting := _BY_VARIABLE.get(variable):
                if text:
                    self._take(setting, variable, text, Setting.parse)
            elif _looks_like_a_setting(variable):
                nearest = _nearest(variable, _BY_VARIABLE)
                raise ConfigError(f"unknown variable {variable}; the nearest is {nearest}")


def _parse_flag(setting: Setting, value: Any) -> object:
    """Repeated flags come as tuples of texts and switches as True."""
    return setting.parse(value) if isinstance(value, str) else value


def _looks_like_a_setting(variable: str) -> bool:
    ours = variable.startswith(_PREFIX) and variable not in _OTHER_VARIABLES
    return ours and not _KUBERNETES.fullmatch(variable)


def _nearest(name: str, known: Iterable[str]) -> str:
    return get_close_matches(name, known, n=1, cutoff=0)[0]
