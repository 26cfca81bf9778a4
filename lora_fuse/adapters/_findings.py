"""What a reader has to say about a file: collected first, raised or warned about once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

_SHOWN = 10


@dataclass
class Findings:
    """Complaints about one source.

    ``fatal`` ones leave the result undefined and always raise; ``tolerable`` ones raise unless ``strict`` is False.
    """

    source: str
    strict: bool = True
    fatal: list[str] = field(default_factory=list)
    tolerable: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Raise a ValueError that lists up to ten complaints, or warn, or do nothing; then start afresh."""
        raising = self.fatal + self.tolerable if self.strict else self.fatal
        if raising:
            raise ValueError(self._text(raising))
        if self.tolerable:
            warnings.warn(self._text(self.tolerable), UserWarning, stacklevel=4)
        self.tolerable = []

    def _text(self, complaints: list[str]) -> str:
        if len(complaints) == 1:
            return f"{self.source}: {complaints[0]}"
        lines = [f"{self.source}: {len(complaints)} problems", *complaints[:_SHOWN]]
        if len(complaints) > _SHOWN:
            lines.append(f"and {len(complaints) - _SHOWN} more")
        return "\n  ".join(lines)
