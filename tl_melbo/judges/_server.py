"""A server as a judge: any that speaks OpenAI's chat completions."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_melbo import checks
from tl_melbo.errors import warn_user
from tl_melbo.files import replacing, writable_folder
from tl_melbo.serving import MOST_BYTES, Server
from tl_melbo.shapes import shape_checked

# What a server may send for each token that was asked for.
_CHARACTERS_A_TOKEN = 64
# Part of the name of an answer's file: raise it when what is in such a file changes.
_FORMAT = 1


@shape_checked
def openai_compatible(
    base_url: str,
    model: str,
    *,
    api_key_env: str | None = "OPENAI_API_KEY",
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
        options: more fields of the request; one that is None is left out. Some models want
            {"max_tokens": None, "max_completion_tokens": 256, "temperature": None}.
        cache: a folder. Answers are kept there as they come, and not asked for again.

    Raises:
        ModuleNotFoundError: openai is not installed.
        ValueError: no such variable, or an address that cannot be one.
        NoAnswer: when asked, if the server cannot be reached, refuses, or sends something else.
    """
    checks.installed("openai", "judges.openai_compatible", "judges")
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
    judge = ServerJudge(base_url, api_key_env, timeout, retries)
    judge.key()  # or say at once that there is none
    judge.settings = settings
    judge.cache = None if cache is None else writable_folder(cache)
    return judge


class ServerJudge(Server):
    """What `openai_compatible` gives: from a text to a text.

    Attributes:
        calls: how many questions the server answered; those from the cache are not among them.
        tokens: what it said that they and their answers cost.
    """

    settings: dict[str, Any]
    cache: Path | None
    calls = tokens = 0

    def __call__(self, text: str) -> str:
        """The answer, from the cache or the server."""
        asked = {**self.settings, "messages": [{"role": "user", "content": text}]}
        path = None
        if self.cache is not None:
            key = json.dumps([_FORMAT, {**asked, "url": self.base_url}], sort_keys=True)
            path = self.cache / f"{_digest(key)}.json"
            if (known := _cached(path)) is not None:
                return known
        answer, tokens = self._content(self.sent("chat.completions", ("model", "messages"), asked))
        self.calls, self.tokens = self.calls + 1, self.tokens + tokens
        if path is not None and answer:
            entry = {"answer": answer, "sha256": _digest(answer), "model": asked["model"]}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(entry), encoding="utf-8")
        return answer

    def _content(self, body: str) -> tuple[str, int]:
        """The answer in what the server sent, and how many tokens it says that it took."""
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            raise self.strange("no JSON", body) from None
        try:
            content = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise self.strange("no choices[0].message.content", body) from None
        if content is None:  # all tokens went into something else
            content = ""
        if not isinstance(content, str):
            raise self.strange(f"a {type(content).__name__} for a text", body)
        most = _CHARACTERS_A_TOKEN * int(self.settings.get("max_tokens", MOST_BYTES))
        if len(content) > most:
            raise self.strange(f"{len(content):,} characters, at most {most:,} were asked for", "")
        usage = reply.get("usage")
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens < 2**40:
            tokens = 0
        return self.safe(content).strip(), tokens

    def __repr__(self) -> str:
        return f"judges.openai_compatible({self.base_url!r}, {self.settings['model']!r})"


def _cached(path: Path) -> str | None:
    """The answer in a file of the cache; None, and a warning, where it is damaged."""
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        entry = json.loads(path.read_text(encoding="utf-8"))
        answer = entry["answer"]
        if not isinstance(answer, str) or _digest(answer) != entry["sha256"]:
            raise ValueError("not what was written")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        warn_user(f"{path}: damaged; the question is asked again")
        return None
    return answer


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
