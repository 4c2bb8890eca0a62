"""``Weights``: an entry's tensors as a read-only mapping, and the lease that backs them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from nbcache.client.fill import Grant, reacquire
from nbcache.errors import InvalidOption, WeightsReleased
from nbcache.units import format_size

if TYPE_CHECKING:
    import torch

if "torch" in sys.modules:  # where torch is there already, its edge is imported now and not in the first load
    import nbcache.client.tensors  # noqa: F401

Share = Literal["cow", "readonly", "private"]
SHARE_MODES: tuple[Share, ...] = ("cow", "readonly", "private")


@dataclass(frozen=True)
class Options:
    """How an entry is to be given: where, as what, shared how. What a pickled ``Weights`` carries beside its key."""

    device: object = None
    dtype: object = None
    share: Share = "cow"

    def check(self) -> None:
        """InvalidOption for a share mode that does not exist; devices and dtypes are checked against torch later."""
        if self.share not in SHARE_MODES:
            raise InvalidOption(f"share={self.share!r}: choose one of {', '.join(SHARE_MODES)}")


class Weights(Mapping[str, "torch.Tensor"]):
    """Tensors of one cached entry, in file order. Get it from :func:`nbcache.load` or :func:`nbcache.put`.

    The tensors of a ``cow`` load share memory with the cache; writing to one changes it for this process alone. The lease on
    the entry ends when the last of them and this object are gone. Pickles by reference: in another process of this user it
    attaches to the same bytes again (EntryNotFound if they are gone by then).

    Attributes
    ----------
    name : the entry's name
    nbytes : bytes of all tensors
    device : where they are
    metadata : the checkpoint's own metadata, strings to strings
    private_bytes : bytes that this process holds for itself alone, after loading
    hit : whether the entry was cached already
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        grant: Grant,
        device: torch.device,
        options: Options,
        private_bytes: int,
    ) -> None:
        self._tensors: dict[str, torch.Tensor] | None = tensors
        self._key = grant.key
        self._options = options
        self.name = grant.name
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.device = device
        self.metadata: Mapping[str, str] = MappingProxyType(dict(grant.manifest.metadata))
        self.private_bytes = private_bytes
        self.hit = grant.hit

    @classmethod
    def over(cls, grant: Grant, options: Options) -> Weights:
        """The tensors of a grant. Takes it over: the lease ends with the last tensor over its map, or here if this raises."""
        from nbcache.client import tensors as edge

        weakref.finalize(grant.area, grant.session.close).atexit = False  # not grant.close: it would keep the area alive
        try:
            device = edge.resolve_device(options.device)
            dtype = edge.resolve_dtype(options.dtype)
            mapped = edge.attach(grant.manifest, grant.area)
            private = options.share == "private"
            given = mapped
            if private or dtype is not None or device.type != "cpu":
                given = edge.convert(mapped, device, dtype, copy=private)
            private_bytes = sum(t.nbytes for name, t in given.items() if t is not mapped[name])
            return cls(given, grant, device, options, private_bytes)
        except BaseException:
            grant.close()
            raise

    def _live(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            raise WeightsReleased(f"{self.name}: these weights were released; load them again")
        return self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._live()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._live())

    def __len__(self) -> int:
        return len(self._live())

    @property
    def released(self) -> bool:
        """Whether :meth:`release` was called."""
        return self._tensors is None

    def release(self) -> None:
        """Drop the tensors. Those still in use elsewhere stay valid, and keep the lease until they go. May be called twice."""
        self._tensors = None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        if self._tensors is None:
            return f"<Weights {self.name!r}: released>"
        private = f", {format_size(self.private_bytes)} private" if self.private_bytes else ""
        size = format_size(self.nbytes)
        return f"<Weights {self.name!r}: {len(self._tensors)} tensors, {size} on {self.device}, {self._options.share}{private}>"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> tuple[object, ...]:
        self._live()
        return attach_again, (self._key, str(self.device), self._options.dtype, self._options.share)


def attach_again(key: str, device: str, dtype: object, share: Share) -> Weights:
    """Unpickle a ``Weights``: attach to the generation it was of."""
    return Weights.over(reacquire(key), Options(device, dtype, share))
