"""The factors of one backward pass's per-sample gradients, kept for what is asked after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from lipcore.layers import Factor

RELEASED = "the factors of the last backward pass were released, as they are when the next forward pass begins"


class KeptFactors(Mapping[str, Factor]):
    """Factors by parameter, from a backward pass until the next forward pass of the model begins.

    They are the layers' inputs and output gradients, which torch would free layer by layer during the backward pass.
    Code may write into them once they are the only ones left (a loader's buffer that was the model's input), so the
    versions of their tensors are looked at like those of saved tensors.
    """

    def __init__(self) -> None:
        self.released = False
        self._factors: dict[str, Factor] = {}
        self._versions: dict[str, list[int]] = {}
        self._bytes = 0  # when they were released

    def add(self, name: str, factor: Factor) -> None:
        self._factors[name] = factor
        self._versions[name] = _versions(factor.tensors())

    def __getitem__(self, name: str) -> Factor:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def nbytes(self) -> int:
        """Bytes that the factors hold or have held, shared ones once."""
        if self.released:
            return self._bytes
        storages = (t.untyped_storage() for factor in self._factors.values() for t in factor.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def changed(self) -> str:
        """Return the name of a parameter whose factor was written into since it came, or ""."""
        for name, factor in self._factors.items():
            if _versions(factor.tensors()) != self._versions[name]:
                return name
        return ""

    def release(self) -> None:
        """Let go of the factors."""
        self._bytes = self.nbytes
        self._factors, self._versions, self.released = {}, {}, True

    def __reduce__(self) -> tuple[Callable[[], KeptFactors], tuple[()]]:
        return _released, ()  # a copied or pickled metric has numbers, and no activations


def _released() -> KeptFactors:
    kept = KeptFactors()
    kept.release()
    return kept


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
