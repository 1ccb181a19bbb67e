"""Base of the results that functions of lipcore.theory return."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lipcore.metric.results import Value, json_ready


@dataclass(frozen=True, repr=False)
class Finding:
    """Base of the results of lipcore.theory: a few values with their labels. ``print`` shows them, ``to_dict()``
    exports them."""

    def __repr__(self) -> str:
        rows = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Value):
                worth = value.label if value.valid else f"not valid: {value.note}"
                note = f" ({value.note})" if value.valid and value.note else ""
                rows.append((field.name, f"{value.value:.6g}", worth + note))
            elif isinstance(value, (bool, int, str)):
                rows.append((field.name, str(value), ""))
            elif isinstance(value, float):
                rows.append((field.name, f"{value:.6g}", ""))
            elif isinstance(value, (list, tuple)):
                rows.append((field.name, f"{len(value)} values", ""))
            else:
                rows.append((field.name, str(value), ""))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"  {name:<{width}}  {number:>12}  {worth}".rstrip() for name, number, worth in rows]
        return "\n".join([type(self).__name__, *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return the result JSON-ready: values as dictionaries, None for what is not finite."""
        return {field.name: json_ready(getattr(self, field.name)) for field in fields(self)}
