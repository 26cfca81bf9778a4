"""A progress bar on stderr, where the caller asked for one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Collection[T], description: str, show: bool) -> Iterator[T] | Iterable[T]:
    """``items``, with a bar while they are consumed if ``show``."""
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=description, total=len(items), console=Console(stderr=True))
