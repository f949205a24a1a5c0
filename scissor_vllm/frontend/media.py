"""Fetches videos as vLLM does, and turns a client's mistake into a 4xx with its reason.

It replaces vLLM's default connector (``MEDIA_CONNECTOR_REGISTRY``), which still fetches images and
audio. Images of a request with ``compress_images`` are fetched before, and given out here by name.
"""

from __future__ import annotations

import binascii
import copy
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

import aiohttp
import requests
from PIL import Image
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from scissor_vllm.frontend.refusal import RefusedRequestError
from scissor_vllm.metrics import Reason
from scissor_vllm.retention import LOADED_MEDIA, RETENTION

CONNECTOR = "http"
"""vLLM's name for its default connector."""
_DATA, _BASE64 = "data:", ";base64,"
_MAX_MEDIA_TYPE = 1024
"""Characters of a data URL in which its media type must end."""
_MAX_URL = 1 << 16
"""Characters of a URL that is no data URL. Presigned ones have some thousand."""
_MAX_SHOWN = 80


@dataclass(frozen=True)
class _Kind:
    """A kind of media in errors."""

    article: str
    noun: str

    @property
    def parameter(self) -> str:
        """Field of a message's part."""
        return f"{self.noun}_url"

    def __str__(self) -> str:
        return f"{self.article} {self.noun}"


_VIDEO, _IMAGE = _Kind("a", "video"), _Kind("an", "image")
_UNREADABLE_IMAGE = (
    *(SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error),
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files, beside the ``OSError`` that vLLM turns into a 400."""


class RefusedMediaError(VLLMUnprocessableEntityError):
    """Media cannot be fetched; vLLM answers it with 422, as it does for a remote 404."""

    reason = Reason.MEDIA_NOT_FETCHED


def register_media_connector() -> None:
    """Replace vLLM's default connector. A connector that the operator chose stays."""
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(VideoMediaConnector)


class VideoMediaConnector(MediaConnector):
    """vLLM's connector with errors that name the cause."""

    def _take_loaded(self, url: str) -> Any:
        """Return what the request's images became under this name, once; None for a URL.

        See ``image_runs``.
        """
        loaded: dict[str, Any] = self.media_io_kwargs.get(RETENTION, {}).get(LOADED_MEDIA, {})
        # Looking up a data URL would hash all of it.
        return loaded.pop(url, None) if loaded else None

    def fetch_image(self, image_url: str, **options: Any) -> Any:
        """Return what vLLM's connector does, or the image that was loaded under this name."""
        if (loaded := self._take_loaded(image_url)) is not None:
            return loaded
        return super().fetch_image(image_url, **options)

    async def fetch_image_async(self, image_url: str, **options: Any) -> Any:
        """Return the same."""
        if (loaded := self._take_loaded(image_url)) is not None:
            return loaded
        return await super().fetch_image_async(image_url, **options)

    def fetch_video(self, video_url: str, **options: Any) -> Any:
        """Return what vLLM's connector does, or the run of images that has this name.

        Raises:
            RefusedRequestError: the URL is invalid, or the operator does not allow it.
            RefusedMediaError: it cannot be fetched.
        """
        if (loaded := self._take_loaded(video_url)) is not None:
            return loaded
        url = self._checked(video_url, _VIDEO)
        with _naming_errors(url, _VIDEO):
            return super(VideoMediaConnector, self._checking_redirects(_VIDEO)).fetch_video(
                url, **options
            )

    async def fetch_video_async(self, video_url: str, **options: Any) -> Any:
        """Return the same; raises as ``fetch_video``."""
        if (loaded := self._take_loaded(video_url)) is not None:
            return loaded
        url = self._checked(video_url, _VIDEO)
        with _naming_errors(url, _VIDEO):
            return await super(
                VideoMediaConnector, self._checking_redirects(_VIDEO)
            ).fetch_video_async(url, **options)

    async def fetch_frame_async(self, image_url: str) -> Any:
        """Return an image that may become a frame; raises as ``fetch_video``.

        Images that stay images are fetched as vLLM fetches them, with its errors.
        """
        url = self._checked(image_url, _IMAGE)
        connector = self._checking_redirects(_IMAGE)
        with _naming_errors(url, _IMAGE):
            try:
                return await super(VideoMediaConnector, connector).fetch_image_async(url)
            except _UNREADABLE_IMAGE as error:
                raise _refused(
                    f"an image must be one that can be decoded ({error}): send it as JPEG or PNG",
                    _IMAGE,
                    Reason.UNREADABLE_VIDEO,
                ) from error

    def _checking_redirects(self, kind: _Kind) -> VideoMediaConnector:
        """Return a connector that follows redirects to allowed hosts only."""
        if not self.allowed_media_domains:
            return self
        connector = copy.copy(self)
        connector.connection = _connection_to(tuple(self.allowed_media_domains), kind)
        return connector

    def _checked(self, url: str, kind: _Kind) -> str:
        """Return the checked URL in the form that vLLM's connector takes."""
        if _is_data(url):
            return _plain_data_url(url, kind)
        if len(url) > _MAX_URL:
            raise _refused(
                f"{kind}'s URL may have at most {_MAX_URL} characters, got {len(url)}: send a data "
                "URL, or a shorter one",
                kind,
            )
        scheme, host = _scheme_and_host(url)
        if scheme == "file":
            self._check_path(url, kind)
        elif scheme not in ("http", "https") or not host:
            raise _refused(
                f"{kind}'s URL must be an http, https or data URL, got {url[:_MAX_SHOWN]!r}", kind
            )
        elif self.allowed_media_domains:
            _check_host(host, self.allowed_media_domains, kind)
        return url

    def _check_path(self, url: str, kind: _Kind) -> None:
        allowed = self.allowed_local_media_path
        path = Path(url2pathname(urlsplit(url).netloc + urlsplit(url).path))
        if allowed is None or allowed not in path.resolve().parents:
            raise _not_allowed("this file: URL", "--allowed-local-media-path", kind)


def _is_data(url: str) -> bool:
    return url[: len(_DATA)].lower() == _DATA


def _scheme_and_host(url: str) -> tuple[str, str | None]:
    """Return a URL's scheme and host. Not for data URLs: urllib keeps the last 128 URLs."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname
    except ValueError:
        return "", None


def _plain_data_url(url: str, kind: _Kind) -> str:
    """Return a data URL without media type parameters: browsers write commas into them."""
    end = url[:_MAX_MEDIA_TYPE].lower().find(_BASE64)
    if end < 0:
        raise _refused(
            f"{kind}'s data URL must be data:TYPE;base64,DATA, got one that begins with "
            f"{url[:32]!r}",
            kind,
        )
    if "," not in url[:end] and url.startswith(_BASE64, end):
        return url
    media_type = url[len(_DATA) : end].partition(";")[0]
    return f"{_DATA}{media_type}{_BASE64}{url[end + len(_BASE64) :]}"


def _check_host(host: str | None, allowed: Any, kind: _Kind) -> None:
    if host not in allowed:
        raise _not_allowed(
            f"the host {(host or '')[:_MAX_SHOWN]!r}", "--allowed-media-domains", kind
        )


def _not_allowed(what: str, option: str, kind: _Kind) -> RefusedRequestError:
    return _refused(
        f"{what} is not allowed by {option} of this server: send the {kind.noun} as a data URL",
        kind,
        Reason.MEDIA_NOT_ALLOWED,
    )


def _refused(
    message: str, kind: _Kind, reason: Reason = Reason.MEDIA_NOT_FETCHED
) -> RefusedRequestError:
    return RefusedRequestError(message, parameter=kind.parameter, reason=reason)


@contextmanager
def _naming_errors(url: str, kind: _Kind) -> Iterator[None]:
    """Raise errors of the client or of the remote host as 4xx errors."""

    def failed(cause: str) -> RefusedMediaError:
        message = f"{_fetching(url, kind)} {cause}: {_REMEDY}"
        return RefusedMediaError(message, parameter=kind.parameter)

    try:
        yield
    except RefusedMediaError:
        raise
    except binascii.Error as error:
        raise _refused(
            f"{kind}'s data must be in base64 ({error}): encode it anew", kind
        ) from error
    except VLLMUnprocessableEntityError as error:
        cause = str(error.args[0]).removeprefix("Failed to fetch media from URL: ")
        raise failed(f"failed ({cause})") from error
    except (aiohttp.ClientResponseError, requests.HTTPError) as error:
        status = getattr(error, "status", None) or getattr(error.response, "status_code", "?")  # type: ignore[union-attr]
        raise failed(f"failed (HTTP {status})") from error
    except TimeoutError as error:
        raise failed("took too long") from error
    except (aiohttp.ClientError, requests.RequestException, OSError) as error:
        raise failed(f"failed ({type(error).__name__})") from error


_REMEDY = "send a URL that this server can read, or a data URL"


def _fetching(url: str, kind: _Kind) -> str:
    if _is_data(url):
        return f"reading the {kind.noun}"
    _, host = _scheme_and_host(url)
    return (
        f"fetching the {kind.noun} from {host[:_MAX_SHOWN]}"
        if host
        else f"reading the {kind.noun}'s file"
    )


@lru_cache(maxsize=8)
def _connection_to(allowed: tuple[str, ...], kind: _Kind) -> HTTPConnection:
    """Return a connection that follows redirects to these hosts only."""
    return _CheckedConnection(allowed, kind)


class _CheckedConnection(HTTPConnection):
    def __init__(self, allowed: tuple[str, ...], kind: _Kind) -> None:
        super().__init__()
        self._allowed = allowed
        self._kind = kind
        self._async_client: aiohttp.ClientSession | None = None

    def get_sync_client(self) -> requests.Session:
        client = super().get_sync_client()
        client.hooks["response"] = [self._check_response]
        return client

    def _check_response(self, response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            self._check_target(response.url, response.headers["location"])

    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._async_client is None:
            tracing = aiohttp.TraceConfig()
            tracing.on_request_redirect.append(self._check_redirect)
            self._async_client = aiohttp.ClientSession(trust_env=True, trace_configs=[tracing])
        return self._async_client

    async def _check_redirect(self, session: Any, context: Any, redirect: Any) -> None:
        headers = redirect.response.headers
        target = headers.get("Location") or headers.get("URI") or ""
        self._check_target(str(redirect.url), target)

    def _check_target(self, url: str, location: str) -> None:
        host = urlsplit(urljoin(url, location)).hostname
        _check_host(host, self._allowed, self._kind)
