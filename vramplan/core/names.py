"""What others know a model by: its Hub id, else the name of its folder or file, never a path of this machine."""

from __future__ import annotations

import re

_CACHED = re.compile(r"models--([^/\\]+)")  # a snapshot in the Hub's cache: models--org--name/snapshots/HASH
_NO_NAME = re.compile(r"[^\w.-]+")


def public_name(place: str) -> str:
    """ "org/name" as it is; "/home/me/models/My 7B" -> "My-7B"; a snapshot in the Hub's cache -> its id."""
    cached = _CACHED.search(place)
    if cached:
        return cached[1].replace("--", "/")
    parts = [part for part in re.split(r"[/\\]", place) if part not in ("", ".", "..", "~")]
    is_path = len(parts) > 2 or place[:1] in "/\\.~" or "\\" in place or place[1:2] == ":" or place.endswith(".gguf")
    if len(parts) == 2 and not is_path:
        return place
    return _NO_NAME.sub("-", parts[-1] if parts else "").strip("-.") or "model"
