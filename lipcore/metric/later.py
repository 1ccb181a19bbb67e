"""Numbers that are made when somebody reads them, so that closing a window does not wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Later(Generic[T]):
    """A result that :meth:`get` makes at its first call, from things that are kept until then.

    Args:
        make: makes it.
        nbytes: size of what is kept for that.
        without: what to give in place of the result, from the reason, where :meth:`drop` came before get().
    """

    def __init__(self, make: Callable[[], T], nbytes: int = 0, without: Callable[[str], T] | None = None) -> None:
        self._make: Callable[[], T] | None = make
        self._without = without
        self._made: T
        self.nbytes = nbytes  #: 0 once it is made

    def get(self) -> T:
        """Return the result."""
        make = self._make  # another thread may be reading too: then it is made twice, and both are right
        if make is not None:
            self._set(make())
        return self._made

    def _set(self, made: T) -> None:
        self._made = made
        self._make, self._without, self.nbytes = None, None, 0

    def drop(self, why: str) -> None:
        """Give up what is kept, unless the result is made already."""
        without = self._without
        if self._make is not None and without is not None:
            self._set(without(why))

    def then(self, turn: Callable[[T], S]) -> Later[S]:
        """Return something to be made of the result."""
        return Later(lambda: turn(self.get()))


class Details(MutableMapping[str, Any]):
    """Facts by name, as a dict; one that is a :class:`Later` is made when it is read."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts

    def __getitem__(self, name: str) -> Any:
        fact = self._facts[name]
        if isinstance(fact, Later):
            fact = self._facts[name] = fact.get()
        return fact

    def __setitem__(self, name: str, fact: Any) -> None:
        self._facts[name] = fact

    def __delitem__(self, name: str) -> None:
        del self._facts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        shown = (f"{name!r}: {'...' if isinstance(fact, Later) else repr(fact)}" for name, fact in self._facts.items())
        return f"{{{', '.join(shown)}}}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_facts": dict(self)}
