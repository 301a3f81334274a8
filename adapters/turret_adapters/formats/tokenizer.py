"""What an adapter's own tokenizer changes of the base model's: added and special tokens, and chat template.

Trainers save the tokenizer beside an adapter. Its model (the vocabulary and merges that it was trained with),
normalizer, pre-tokenizer and decoder must be the base's. So all tokenizers share the memory of one model, and
a stranger's file cannot make tokenising slow. Only the changes are kept, as JSON, in `TOKENIZER_NAME`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from turret_adapters.errors import (
    AdapterBaseError,
    AdapterFormatError,
    AdapterSourceError,
    SourceUnavailableError,
)
from turret_adapters.formats import split_tokenizer
from turret_adapters.formats.fields import parse_object, show
from turret_adapters.formats.files import (
    MAX_FILE_BYTES,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    describe,
    open_inside,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ADDED_TOKENS = 1 << 14
MAX_TOKEN_CHARACTERS = 512
MAX_FRAME_TOKENS = 32
# A template that frames every prompt with special tokens.
MAX_POST_PROCESSOR_BYTES = 16 << 10

_JSON, _CONFIG, _MAP, _TEMPLATE = TOKENIZER_FILES
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_SHARED = ("normalizer", "pre_tokenizer", "decoder")
_TOKEN_FIELDS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
# More tokens than a frame may add.
_PROBE = "a b " * 64
_REMEDY = "(delete the tokenizer's files from the adapter's folder to use the base model's tokenizer)"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTokenizer:
    """A tokenizer; its members are named as those of `PreTrainedTokenizerBase`."""

    backend_tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)


class BaseTokenizer:
    """The base model's tokenizer, with which those of adapters are compared. Thread-safe."""

    def __init__(self, live: PreTrainedTokenizerBase, file: Path | None) -> None:
        """`live` is the tokenizer, and `file` the `tokenizer.json` from which transformers made it, if there
        is one: what it makes may be written otherwise than the file.
        """
        self.live = live
        self._file = file
        self._reader = _Reader()

    def interrupt(self) -> None:
        """Ends what `changes` reads, and lets it read no more."""
        self._reader.interrupt()

    @cached_property
    def _splits(self) -> list[Any]:
        texts = [self.live.backend_tokenizer.to_str().encode()]
        if self._file is not None:
            with suppress(OSError):  # deleted since the start
                texts.append(self._file.read_bytes())
        return [self._reader.read("split", text) for text in texts]

    @cached_property
    def _sections(self) -> dict[str, list[Any]]:
        """Each section of the base's, as its files have it and as `tokenizers` writes it."""
        names = (*_SHARED, "post_processor")
        found = {name: [split["rest"][name] for split in self._splits] for name in names}
        return {
            name: [*sections, *(split_tokenizer.canonical(name, each) for each in sections)]
            for name, sections in found.items()
        }

    def changes(self, folder: Path) -> bytes:
        """What the tokenizer in an adapter's folder, or a chat template alone, changes, as JSON; empty if
        nothing, or if there is neither.

        Raises:
            AdapterFormatError: its files are broken, or too large.
            AdapterBaseError: it is not the base's with other added tokens, special tokens or chat template.
            AdapterSourceError: a file is unreadable, or a link out of the folder.
            SourceUnavailableError: `interrupt` was called.
        """
        try:
            tokens = self._changed_tokens(folder) if (folder / _JSON).exists() else None
            template = _chat_template(folder)
        except RecursionError as error:
            raise AdapterFormatError(
                f"{_JSON}: expected a tokenizer, found one nested too deeply {_REMEDY}"
            ) from error
        except OSError as error:
            raise AdapterSourceError(
                f"{error.filename!r}: expected a readable file, found {describe(error)} {_REMEDY}"
            ) from error
        template = None if template == self.live.chat_template else template
        changes = {"tokens": tokens, "chat_template": template}
        if changes == {"tokens": None, "chat_template": None}:
            return b""
        data = json.dumps(changes, sort_keys=True).encode()
        if len(data) > MAX_FILE_BYTES[TOKENIZER_NAME]:
            raise AdapterFormatError(
                f"expected at most {MAX_FILE_BYTES[TOKENIZER_NAME]} bytes of added tokens and chat template, "
                f"found {len(data)} {_REMEDY}"
            )
        return data

    def _changed_tokens(self, folder: Path) -> dict[str, Any] | None:
        """The tokens of the folder's tokenizer; None if they are the base's."""
        with open_inside(folder, _JSON, MAX_FILE_BYTES[_JSON]) as (file, size):
            found = self._reader.read("split", file.read(size))
        if all(found["model"] != of_base["model"] for of_base in self._splits):
            raise AdapterBaseError(
                f"{_JSON}: expected the base model's vocabulary, with or without added tokens, found another "
                f"one {_REMEDY}"
            )
        rest = found["rest"]
        for name in _SHARED:
            if not self._is_base(name, rest[name]):
                raise AdapterBaseError(
                    f"{_JSON}: expected the {name!r} of the base model's tokenizer, found "
                    f"{show(rest[name])} {_REMEDY}"
                )
        tokens = self._special_tokens(folder) | {"added_tokens": rest["added_tokens"] or []}
        if not self._is_base("post_processor", rest["post_processor"]):
            tokens["post_processor"] = rest["post_processor"]
        own = self._changed(tokens)
        tokens["num_rows"] = self._num_rows(own, padding=tokens.pop("pad_token"))
        return None if self._has_same_tokens(own) else tokens

    def changed(self, changes: bytes) -> OwnTokenizer:
        """The tokenizer with the changes of tokens that `changes` returned.

        Raises:
            AdapterFormatError: they are broken, or number a token otherwise than the tokenizer does.
        """
        return self._changed(parse_object(changes, TOKENIZER_NAME)["tokens"])

    def _changed(self, values: Mapping[str, Any]) -> OwnTokenizer:
        base = self.live.backend_tokenizer
        with _errors_of_the_tokenizer():
            own = Tokenizer(base.model)
            for name in _SHARED:
                if getattr(base, name) is not None:
                    setattr(own, name, getattr(base, name))
            _add_tokens(own, values["added_tokens"])
            _check_number(values["special_tokens"])
            own.add_special_tokens(values["special_tokens"])
            if "post_processor" not in values:
                if base.post_processor is not None:
                    own.post_processor = base.post_processor
            elif values["post_processor"] is not None:
                _set_frame(own, values["post_processor"])
        return OwnTokenizer(
            backend_tokenizer=own,
            bos_token=values["bos_token"],
            eos_token=values["eos_token"],
        )

    def _is_base(self, name: str, section: object) -> bool:
        """Whether a section is the base's; versions of `tokenizers` write defaults differently."""
        of_base = self._sections[name]
        if section in of_base:
            return True
        return self._reader.read("canonical", json.dumps([name, section]).encode()) in of_base

    def _num_rows(self, own: OwnTokenizer, padding: str | None) -> int:
        """How many rows an embedding must have for the tokens that the base's tokenizer lacks. Trainers often
        add a padding token, which is in no prompt, without a row.
        """
        base = self.live.backend_tokenizer
        added = own.backend_tokenizer.get_added_tokens_decoder().items()
        new = [i for i, each in added if each.content not in (base.id_to_token(i), padding)]
        return max(new, default=-1) + 1

    def _has_same_tokens(self, own: OwnTokenizer) -> bool:
        return (own.bos_token, own.eos_token, _differences(own.backend_tokenizer)) == (
            self.live.bos_token,
            self.live.eos_token,
            _differences(self.live.backend_tokenizer),
        )

    def _special_tokens(self, folder: Path) -> dict[str, Any]:
        """The special tokens that the folder's configuration names, or else the base's."""
        config = {**_object(folder, _MAP), **_object(folder, _CONFIG)}
        if not any(name in config for name in _NAMED):
            config = {name: getattr(self.live, name) for name in _NAMED}
        named = {name: _text(config.get(name)) for name in _NAMED}
        listed = [_text(token) for key in _LISTED for token in _list(config.get(key))]
        return {
            "bos_token": named["bos_token"],
            "eos_token": named["eos_token"],
            "pad_token": named["pad_token"],
            "special_tokens": list(dict.fromkeys(token for token in [*named.values(), *listed] if token)),
        }


@contextmanager
def _errors_of_the_tokenizer() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # A panic of the library's Rust code is no Exception, but concerns this tokenizer alone.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise AdapterFormatError(f"{_JSON}: expected a tokenizer, found: {error} {_REMEDY}") from error


def _set_frame(own: Tokenizer, section: object) -> None:
    """Sets what frames a text: it must be short, and have the text once and tokens that there are."""
    plain = own.encode(_PROBE).ids
    own.post_processor = _post_processor(section)
    framed = own.encode(_PROBE).ids
    num_added = len(framed) - len(plain)
    if not 0 <= num_added <= MAX_FRAME_TOKENS:
        raise ValueError(
            f"a frame that makes {len(framed)} tokens of {len(plain)}; it may add up to {MAX_FRAME_TOKENS}"
        )
    if max(framed, default=0) >= own.get_vocab_size():
        raise ValueError(f"a frame with token {max(framed)}, of {own.get_vocab_size()} tokens")
    if own.encode(_PROBE, add_special_tokens=False).ids != plain:
        raise ValueError("a frame that changes a text without special tokens")
    own.decode(framed)


class _Reader:
    """Runs `split_tokenizer`, one process at a time: each may take much memory and a core. Thread-safe."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        # Guards the other two.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            if self._process is not None:
                self._process.kill()

    def read(self, how: str, text: bytes) -> Any:
        """What the program prints for a text.

        Raises:
            AdapterFormatError: it fails.
            SourceUnavailableError: it was interrupted.
        """
        with self._one_at_a_time, self._started(how) as process:
            printed, said = process.communicate(text)
        self._check_interrupted()
        if process.returncode:
            # A panic of the library writes lines before that of the program.
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            found = last or "a file that takes too much time or memory"
            raise AdapterFormatError(f"{_JSON}: expected a tokenizer, found: {found} {_REMEDY}")
        return json.loads(printed)

    @contextmanager
    def _started(self, how: str) -> Iterator[subprocess.Popen[bytes]]:
        program, pipe = [sys.executable, "-I", split_tokenizer.__file__, how], subprocess.PIPE
        with self._lock:
            self._check_interrupted()
            process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe)  # noqa: S603 (our own)
            self._process = process
        try:
            with process:
                yield process
        finally:
            with self._lock:
                self._process = None

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise SourceUnavailableError("the server is stopping; load the adapter again after its restart")


def _pipeline(sections: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer that knows no text."""
    return Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "model": split_tokenizer.EMPTY_MODEL, **sections})
    )


def _post_processor(section: object) -> Any:
    size = len(json.dumps(section))
    if size > MAX_POST_PROCESSOR_BYTES:
        raise ValueError(f"a post-processor of {size} bytes; at most {MAX_POST_PROCESSOR_BYTES} are allowed")
    return _pipeline({"post_processor": section}).post_processor


def _add_tokens(own: Tokenizer, tokens: list[dict[str, Any]]) -> None:
    """Adds tokens in the order of their ids, which must be those that they get."""
    _check_number(tokens)
    if unknown := {name for token in tokens for name in token} - _TOKEN_FIELDS:
        raise ValueError(f"an added token with {show(min(unknown))}, which is unknown")
    added = []
    for token in sorted(tokens, key=lambda token: int(token["id"])):
        flags = {name: value for name, value in token.items() if name not in ("id", "content")}
        length = len(token["content"])
        if not 0 < length <= MAX_TOKEN_CHARACTERS:
            raise ValueError(f"an added token of {length} characters, not 1 to {MAX_TOKEN_CHARACTERS}")
        added.append(AddedToken(token["content"], **flags))
    own.add_tokens(added)
    for token in tokens:
        found = own.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"added token {show(token['content'])} with id {show(token['id'])}, which is number {found} "
                "after the base model's vocabulary"
            )


def _check_number(tokens: Sized) -> None:
    if len(tokens) > MAX_ADDED_TOKENS:
        raise ValueError(f"{len(tokens)} added tokens; at most {MAX_ADDED_TOKENS} are allowed")


def _differences(backend: Tokenizer) -> tuple[object, ...]:
    """What may differ between the tokenizers of one base."""
    tokens = backend.get_added_tokens_decoder()
    pipeline = _pipeline({})
    if backend.post_processor is not None:
        pipeline.post_processor = backend.post_processor
    return pipeline.to_str(), {token_id: token.__getstate__() for token_id, token in tokens.items()}


def _chat_template(folder: Path) -> str | dict[str, str] | None:
    """The chat template, or several by their names, as older versions of transformers write them."""
    if (folder / _TEMPLATE).exists():
        with open_inside(folder, _TEMPLATE, MAX_FILE_BYTES[_TEMPLATE]) as (file, size):
            return file.read(size).decode(errors="replace")
    template = _object(folder, _CONFIG).get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict)]
        found = {str(each.get("name")): each.get("template") for each in named}
        return {name: each for name, each in found.items() if isinstance(each, str)} or None
    return template if isinstance(template, str) else None


def _object(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).exists():
        return {}
    with open_inside(folder, name, MAX_FILE_BYTES[name]) as (file, size):
        return parse_object(file.read(size), name)


def _list(value: object) -> list[object]:
    """Newer versions of transformers name the tokens of the list."""
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []


def _text(token: object) -> str | None:
    """Older versions of transformers write a token with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and 0 < len(content) <= MAX_TOKEN_CHARACTERS else None


def digest_of_tokens(changes: bytes) -> str:
    """Identifies the tokens of what `BaseTokenizer.changes` returned; empty if they are the base's.

    Raises:
        AdapterFormatError: it is broken.
    """
    return _digest(changes, "tokens")


def digest_of_template(changes: bytes) -> str:
    """Identifies the chat template of what `BaseTokenizer.changes` returned; empty if it is the base's.

    Raises:
        AdapterFormatError: it is broken.
    """
    return _digest(changes, "chat_template")


def chat_template_of(changes: bytes) -> str | dict[str, str] | None:
    """The chat template of what `BaseTokenizer.changes` returned, or several by their names; None if it is
    the base's.

    Raises:
        AdapterFormatError: it is broken.
    """
    found = parse_object(changes, TOKENIZER_NAME).get("chat_template") if changes else None
    return found if isinstance(found, str | dict) else None


def check_rows(changes: bytes, num_rows: int) -> None:
    """Checks that an embedding with so many rows has those of all tokens that `BaseTokenizer.changes` found.

    Raises:
        AdapterFormatError: it is broken.
        AdapterBaseError: a token has none.
    """
    tokens = _tokens_of(changes)
    if tokens and tokens.get("num_rows", 0) > num_rows:
        last = tokens["num_rows"] - 1
        text = next((each["content"] for each in tokens["added_tokens"] if each["id"] == last), "")
        raise AdapterBaseError(
            f"{_JSON}: expected added tokens below {num_rows}, the rows of the embedding, found {show(text)} "
            f"with id {last} (save the adapter with its resized embeddings, as with save_embedding_layers="
            "True, or delete the tokenizer's files from its folder)"
        )


def _tokens_of(changes: bytes) -> dict[str, Any] | None:
    return parse_object(changes, TOKENIZER_NAME).get("tokens") if changes else None


def _digest(changes: bytes, name: str) -> str:
    found = parse_object(changes, TOKENIZER_NAME).get(name) if changes else None
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""
