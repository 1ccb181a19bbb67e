"""The text of a page that people read."""

from __future__ import annotations

import html
import re


def text_of(page: str) -> str:
    """Return it without elements, scripts and styles, in one line."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page)))
