"""A server that speaks OpenAI's protocol: asked with a key that shows nowhere, and not trusted."""

import functools
import operator
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from tl_melbo.errors import NoAnswer
from tl_melbo.text import printable, quoted

# What a server may send in all.
MOST_BYTES = 2**20
# Keys of servers that ask for none, such as "none" or "EMPTY", are words that an answer may hold.
_SHORTEST_SECRET = 8
_HIDDEN = "[key]"


class Server:
    """An address, and the name of the environment's variable that holds its key."""

    def __init__(
        self, base_url: str, api_key_env: str | None, timeout: float, retries: int
    ) -> None:
        self.base_url, self.api_key_env = _address(base_url), api_key_env
        self.timeout, self.retries = timeout, retries

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

    def sent(self, resource: str, known: tuple[str, ...], asked: Mapping[str, Any]) -> str:
        """The body of the answer by a resource of the client, which has arguments for `known`.

        Raises:
            NoAnswer: the server cannot be reached, refuses, or does not end.
        """
        import openai

        problem = ""
        try:
            raw = operator.attrgetter(resource)(self._client).with_raw_response
            own = {name: asked.get(name, openai.NOT_GIVEN) for name in known}
            others = {name: value for name, value in asked.items() if name not in known}
            return raw.create(**own, extra_body=others).text
        except openai.APIStatusError as error:
            problem = f"refused with status {error.status_code}: {quoted(self.safe(error.message))}"
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

    def strange(self, what: str, body: str) -> NoAnswer:
        """What to raise where the server sent something else."""
        shown = f": {quoted(self.safe(body))}" if body else ""
        return NoAnswer(f"{self.base_url}: the server sent {what}{shown}; is it OpenAI-compatible?")

    def safe(self, text: str) -> str:
        """What a server says, without the key that it may echo, and with no control characters."""
        # The key that was sent, whatever the environment holds now.
        key = "" if self.api_key_env is None else str(self._client.api_key)
        return printable(text.replace(key, _HIDDEN) if len(key) >= _SHORTEST_SECRET else text)

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
                if size > MOST_BYTES:
                    raise _Refused(f"more than {MOST_BYTES:,} bytes")
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
