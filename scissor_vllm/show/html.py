"""A picture as one HTML file with inline frames, arrays, style and script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path

from scissor_vllm.show.picture import Picture

PAGE = Path(__file__).with_name("page")


def save_html(picture: Picture, path: Path) -> None:
    """Write the page atomically."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(as_html(picture), encoding="utf-8")
    unfinished.replace(path)


def as_html(picture: Picture) -> str:
    """Return the page. Its policy allows its own script and style by their hashes only."""
    style, script = _read("style.css"), _read("picture.js") + _read("show.js")
    policy = (
        f"default-src 'none'; img-src data:; script-src {_hash_of(script)}; "
        f"style-src {_hash_of(style)}; base-uri 'none'; form-action 'none'"
    )
    # Inside a script element only "</script" and "<!--" are special.
    data = json.dumps(picture.as_json(), separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "POLICY": policy,
        "NAME": html.escape(picture.name),
        "STYLE": style,
        "DATA": data,
        "SCRIPT": script,
    }
    # In one pass, because a name may contain a placeholder.
    before, *places = _read("show.html").split("{{")
    filled = [before]
    for place in places:
        key, after = place.split("}}", 1)
        filled += [parts[key], after]
    return "".join(filled)


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
