"""Groups of parameters: by block, by expressions, or by a callable."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def by_block(name: str) -> str:
    """Name the group of a parameter: its name up to the first number ("layers.3"), else the module that owns it, else
    "root".

    >>> by_block("encoder.layers.3.attention.query.weight"), by_block("head.weight"), by_block("scale")
    ('encoder.layers.3', 'head', 'root')
    """
    words = name.split(".")
    for i, word in enumerate(words[:-1]):
        if word.isdigit():
            return ".".join(words[: i + 1])
    return ".".join(words[:-1]) or "root"


Groups = Callable[[str], str] | Mapping[str, str]


def group_names(groups: Groups) -> Callable[[str], str]:
    """Make a function from parameter name to group name, from such a function or from {group: regular expression}."""
    if callable(groups):
        return groups
    if not isinstance(groups, Mapping) or not groups:
        raise TypeError(
            "groups: expected a callable name -> group name or a dict {group: regular expression}, got "
            f"{type(groups).__name__}"
        )
    patterns = {}
    for group, pattern in groups.items():
        try:
            patterns[group] = re.compile(pattern)
        except (re.error, TypeError) as error:  # noqa: PERF203
            raise ValueError(f"groups: the expression of {group!r}, {pattern!r}, cannot be read: {error}") from None
    return lambda name: next((group for group, pattern in patterns.items() if pattern.search(name)), "other")
