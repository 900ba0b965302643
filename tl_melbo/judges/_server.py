"""A server as a judge: any that speaks OpenAI's chat completions."""

import functools
import json
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tl_melbo import checks
from tl_melbo.errors import NoAnswer
from tl_melbo.judges._cache import Cache
from tl_melbo.shapes import shape_checked
from tl_melbo.text import printable, quoted

# What a server may send in all, and for each token that was asked for.
_MOST_BYTES = 2**20
_CHARACTERS_A_TOKEN = 64
# Keys of servers that ask for none, such as "none" or "EMPTY", are words that an answer may hold.
_SHORTEST_SECRET = 8
_HIDDEN = "[key]"


@shape_checked
def openai_compatible(
    base_url: str,
    model: str,
    *,
    api_key_env: str | None = "OPENAI_API_KEY",
    system: str | None = None,
    timeout: float = 60.0,
    retries: int = 2,
    max_tokens: int = 256,
    options: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> "ServerJudge":
    """A judge behind an OpenAI-compatible server, asked at temperature 0.

        judge = tm.judges.openai_compatible("https://api.example.org/v1", "my-model")

    The key is read from the environment and is never shown, saved or logged by this package.

    Args:
        base_url: with its "/v1", if the server has one.
        api_key_env: the environment variable that holds the key; None for a server without keys.
        timeout: seconds for one try, to the last byte of the answer.
        retries: how often a question is asked again after a time-out, a lost connection, or an
            error that the server calls temporary.
        max_tokens: of an answer.
        options: more fields of the request; one that is None is left out. Some models want
            {"max_tokens": None, "max_completion_tokens": 256, "temperature": None}.
        cache: a folder. Answers are kept there as they come, and not asked for again.

    Raises:
        ModuleNotFoundError: openai is not installed.
        ValueError: no such variable, or an address that cannot be one.
        NoAnswer: when asked, if the server cannot be reached, refuses, or sends something else.
    """
    checks.installed(
        "openai", "judges.openai_compatible", "judges"
    )  # or say at once that it is missing
    checks.positive(timeout=timeout)
    checks.at_least(0, retries=retries)
    checks.at_least(1, max_tokens=max_tokens)
    checks.as_text(model, "model")
    settings = {"model": model, "max_tokens": max_tokens, "temperature": 0.0, **(options or {})}
    if taken := {"messages", "stream", "n"} & {*settings}:
        raise ValueError(f"options: {sorted(taken)} are set by the judge; leave them out")
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        json.dumps(settings)
    except TypeError as error:
        raise ValueError(f"options: {error}; pass what JSON can hold") from None
    judge = ServerJudge(_address(base_url), settings, system, api_key_env, timeout, retries)
    judge.key()  # or say at once that there is none
    judge.cache = None if cache is None else Cache(cache)
    return judge


class ServerJudge:
    """What `openai_compatible` gives: from a text to a text.

    Attributes:
        calls: how many questions the server answered; those from the cache are not among them.
        tokens: what it said that they and their answers cost.
    """

    def __init__(
        self,
        base_url: str,
        settings: Mapping[str, Any],
        system: str | None,
        api_key_env: str | None,
        timeout: float,
        retries: int,
    ) -> None:
        self.base_url, self.settings, self.system = base_url, dict(settings), system
        self.api_key_env, self.timeout, self.retries = api_key_env, timeout, retries
        self.cache: Cache | None = None
        self.calls = self.tokens = 0

    def __call__(self, text: str) -> str:
        """The answer, from the cache or the server."""
        messages = [{"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        asked = {**self.settings, "messages": messages}
        known = None if self.cache is None else self.cache.get({**asked, "url": self.base_url})
        if known is not None:
            return known
        answer, tokens = self._content(self._sent(asked))
        self.calls, self.tokens = self.calls + 1, self.tokens + tokens
        if self.cache is not None and answer:
            self.cache.put({**asked, "url": self.base_url}, answer)
        return answer

    def key(self) -> str:
        """The key, from the environment alone."""
        if self.api_key_env is None:
            return "none"
        key = os.environ.get(self.api_key_env, "").strip()
        named = f"api_key_env={self.api_key_env!r}"
        if not key:
            raise ValueError(
                f"{named}: the environment has no such variable, or it is empty; set it, name "
                "another one, or pass None for a server without keys"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{named}: what it holds cannot be a key; set it again")
        return key

    @functools.cached_property
    def _client(self) -> Any:
        import openai

        client = openai.OpenAI(
            base_url=self.base_url,
            api_key=self.key(),
            max_retries=self.retries,
            timeout=self.timeout,
            # Not packed, so that what is counted is all that there is.
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,
                timeout=self.timeout,
                event_hooks={
                    "response": [functools.partial(_bounded, time.monotonic, self.timeout)]
                },
            ),
        )
        weakref.finalize(self, client.close)  # it keeps its connection until then
        return client

    def _sent(self, asked: Mapping[str, Any]) -> str:
        """The body of the server's answer."""
        import openai

        problem = ""
        try:
            completions = self._client.chat.completions.with_raw_response
            known = {name: asked[name] for name in ("model", "messages")}
            others = {name: value for name, value in asked.items() if name not in known}
            return completions.create(**known, extra_body=others).text
        except openai.APIStatusError as error:
            problem = (
                f"refused with status {error.status_code}: {quoted(self._safe(error.message))}"
            )
        except openai.APITimeoutError:
            problem = f"gave no whole answer in timeout={self.timeout:g} s, {self.retries} retries"
        except openai.APIConnectionError as error:
            why = type(error.__cause__ or error).__name__
            problem = f"cannot be reached, or broke off ({why}), {self.retries} retries"
        except _Refused as error:
            problem = f"sent what is not read: {error}"
        except Exception as error:  # whatever else the client raises may hold the key, too
            problem = f"cannot be asked, or cannot be understood ({type(error).__name__})"
        # Out here, where the client's error, which holds the request with its key, is forgotten.
        raise NoAnswer(f"{self.base_url}: the server {problem}")

    def _content(self, body: str) -> tuple[str, int]:
        """The answer in what the server sent, and how many tokens it says that it took."""
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            raise self._strange("no JSON", body) from None
        try:
            content = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise self._strange("no choices[0].message.content", body) from None
        if content is None:  # all tokens went into something else
            content = ""
        if not isinstance(content, str):
            raise self._strange(f"a {type(content).__name__} for a text", body)
        most = _CHARACTERS_A_TOKEN * int(self.settings.get("max_tokens", _MOST_BYTES))
        if len(content) > most:
            raise self._strange(f"{len(content):,} characters, at most {most:,} were asked for", "")
        usage = reply.get("usage")
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens < 2**40:
            tokens = 0
        return self._safe(content).strip(), tokens

    def _strange(self, what: str, body: str) -> NoAnswer:
        shown = f": {quoted(self._safe(body))}" if body else ""
        return NoAnswer(f"{self.base_url}: the server sent {what}{shown}; is it OpenAI-compatible?")

    def _safe(self, text: str) -> str:
        """What a server says, without the key that it may echo, and with no control characters."""
        # The key that was sent, whatever the environment holds now.
        key = "" if self.api_key_env is None else str(self._client.api_key)
        return printable(text.replace(key, _HIDDEN) if len(key) >= _SHORTEST_SECRET else text)

    def __repr__(self) -> str:
        return f"judges.openai_compatible({self.base_url!r}, {self.settings['model']!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the client, which holds the key."""
        return {name: value for name, value in vars(self).items() if name != "_client"}


class _Refused(Exception):
    """What came back was cut off by us."""


def _bounded(clock: Any, timeout: float, response: Any) -> None:
    """A hook of the HTTP client: an answer has to end, in time and in size."""
    import httpx2

    packed = response.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise _Refused(f"packed as {quoted(printable(packed))}")
    stream, ends = response.stream, clock() + timeout

    class Bounded(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in stream:
                size += len(chunk)
                if size > _MOST_BYTES:
                    raise _Refused(f"more than {_MOST_BYTES:,} bytes")
                if clock() > ends:
                    raise httpx2.ReadTimeout("the answer does not end")
                yield chunk

        def close(self) -> None:
            stream.close()

    response.stream = Bounded()


def _address(base_url: str) -> str:
    """The address of a server, without anything secret in it."""
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address, parts = False, urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(
            "base_url: holds a user, a password or a query; pass the address alone, and the key "
            "through the environment (api_key_env=)"
        )
    if not is_address or not base_url.isprintable() or " " in base_url:
        raise ValueError(
            f"base_url={printable(base_url)!r}: not an address such as 'http://127.0.0.1:8000/v1'"
        )
    return base_url.rstrip("/")
