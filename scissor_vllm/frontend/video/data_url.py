"""Data URLs of videos as browsers make them."""

from __future__ import annotations

import re

# A browser's recorder names its codecs, separated by a comma, which ends the media type for vLLM.
_WITH_PARAMETERS = re.compile(
    r"""data:(video/[\w.+-]+)(?:;(?!base64,)(?:"[^"]*"|[^";])*)+;base64,""", re.IGNORECASE
)
_MAX_HEADER_LENGTH = 512


def without_parameters(url: str) -> str:
    """Return a base64 data URL of a video without the parameters of its media type.

    `data:video/webm;codecs=vp8,opus;base64,...` becomes `data:video/webm;base64,...`. Any other
    URL comes back as it is.
    """
    header = _WITH_PARAMETERS.match(url[:_MAX_HEADER_LENGTH])
    return url if header is None else f"data:{header[1]};base64,{url[header.end() :]}"
