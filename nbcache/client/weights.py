"""``Weights``: an entry's tensors as a read-only mapping, and the lease that backs them."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator, Mapping
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from nbcache.client.options import Loaded, Options, Share
from nbcache.errors import InvalidOption, WeightsReleased
from nbcache.manifest import BLOCKS
from nbcache.pages import TensorRow, details, page, tensor_table
from nbcache.units import format_size

if TYPE_CHECKING:
    import torch


class Weights(Mapping[str, "torch.Tensor"]):
    """Tensors of one cached entry, in the checkpoint's order. Get it from :func:`nbcache.load` or :func:`nbcache.put`.

    The tensors of a ``cow`` load share memory with the cache; writing to one changes it for this process alone, and with it the
    tensors that share its memory in the file. The lease on the entry ends when the last of them and this object are gone.
    Pickles by reference: in another process of this user it attaches to the same bytes again, so ``torch.save`` of it saves no
    weights; save ``dict(weights)``. If they are gone by then, the first use there raises EntryNotFound, or DaemonUnavailable.

    Attributes
    ----------
    name : the entry's name
    nbytes : bytes of all tensors
    device : where they are
    metadata : the checkpoint's own metadata, strings to strings
    private_bytes : bytes that this process holds for itself alone, after loading
    hit : whether nothing had to be read or copied for it: it was cached where it was wanted
    read : whether files were read; False, too, if it was copied to a GPU from the cache's own host memory
    """

    def __init__(self, loaded: Loaded, options: Options) -> None:
        self._tensors: dict[str, torch.Tensor] | None = loaded.tensors
        self._slab = loaded.slab
        self._key = loaded.key
        self._options = options
        self.name = loaded.name
        self.nbytes = loaded.nbytes
        self.device = loaded.device
        self.metadata: Mapping[str, str] = MappingProxyType(dict(loaded.manifest.metadata))
        self.private_bytes = loaded.private_bytes
        self.hit = loaded.hit
        self.read = loaded.read and not loaded.hit
        self._manifest = loaded.manifest
        _alive.add(self)

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

    def cupy(self) -> dict[str, Any]:
        """CuPy arrays over the same bytes, read-only memory of the slab, without a private copy; for weights on a GPU.

        A dtype that CuPy lacks (bfloat16, the 8-bit floats) comes as unsigned integers of its width. InvalidOption if the
        weights are not in a slab (on the CPU, or private copies); PackageMissing without CuPy; WeightsReleased.
        """
        self._live()
        if self._slab is None:
            remedy = "share='readonly' (or 'cow')" if self.device.type == "cuda" else "device='cuda'"
            raise InvalidOption(f"{self.name}: on {self.device}, without a slab; load it with {remedy} for CuPy arrays")
        return self._slab.cupy_arrays()

    @property
    def quant_types(self) -> dict[str, str]:
        """The quant type (``Q4_K``, ...) of each tensor that is quantized; its bytes are what the mapping gives. GGUF alone."""
        return {extent.name: extent.dtype for extent in self._manifest.tensors if extent.dtype in BLOCKS}

    def dequantize(self, dtype: str | torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Ordinary tensors, with the quantized ones computed, in private memory; the others as they are.

        ``dtype`` is what floating-point tensors are cast to; None gives float32 for what was quantized. The gguf package
        computes on the CPU; results go to where the weights are. PackageMissing without it, UnsupportedFormat for a type that
        it does not compute, InvalidOption, WeightsReleased.
        """
        from nbcache.client.quantized import dequantize

        return dequantize(self._live(), self._manifest, dtype)

    @property
    def key(self) -> str:
        """The key of the entry: what its files, or the saved bytes, are."""
        return self._key

    @property
    def released(self) -> bool:
        """Whether :meth:`release` was called."""
        return self._tensors is None

    def release(self) -> None:
        """Drop the tensors. Those still in use elsewhere stay valid, and keep the lease until they go. May be called twice."""
        self._tensors = self._slab = None
        if "torch" in sys.modules:
            from nbcache.client import cow

            cow.sweep()

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

    def _repr_html_(self) -> str:
        """What a notebook shows: the line, which opens to the tensors."""
        if self._tensors is None:
            return page(escape(repr(self)))
        rows = [
            TensorRow(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes)
            for name, tensor in self._tensors.items()
        ]
        private = f", {format_size(self.private_bytes)} private"
        head = f"{len(rows)} tensors, {format_size(self.nbytes)} on {self.device}, {self._options.share}{private}"
        return page(details(f"<b>{escape(self.name)}</b> {escape(head)}", tensor_table(rows)))

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __copy__(self) -> dict[str, torch.Tensor]:
        """A dict of the same tensors."""
        return dict(self._live())

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, torch.Tensor]:
        """A dict of copies, private to this process."""
        return {name: copy.deepcopy(tensor, memo) for name, tensor in self._live().items()}

    def __reduce__(self) -> tuple[object, ...]:
        self._live()
        return attach_again, (self._key, str(self.device), self._options.dtype, self._options.share)


class LostWeights(Weights):
    """What a pickled ``Weights`` becomes where it cannot attach again: whatever it is asked for, it raises why.

    Unpickling does not: a worker of a pool would end by that, and who waits for its answer would wait for ever.
    """

    def __init__(self, key: str, error: Exception) -> None:
        self._tensors = self._slab = None
        self._key = key
        self._error = error

    def _live(self) -> NoReturn:
        raise self._error.with_traceback(None)

    def __getattr__(self, name: str) -> NoReturn:
        """Python calls this for what :class:`Weights` would have set."""
        if name.startswith("_"):
            raise AttributeError(name)
        self._live()

    @property
    def released(self) -> bool:
        """See :class:`Weights`; it never had any."""
        return False

    def __repr__(self) -> str:
        return f"<Weights {self._key!r}: lost>"


_alive: weakref.WeakSet[Weights] = weakref.WeakSet()


def alive() -> list[Weights]:
    """Those of this process that hold tensors."""
    return [weights for weights in _alive if not weights.released]


def attach_again(key: str, device: str, dtype: object, share: Share) -> Weights:
    """Unpickle a ``Weights``: attach to the generation it was of, now, so that it is leased; what fails is told at its use."""
    try:
        from nbcache.client.loading import load_key

        options = Options(device, dtype, share)
        return Weights(load_key(key, options), options)
    except Exception as error:  # noqa: BLE001 - whatever it is: see there
        return LostWeights(key, error.with_traceback(None))
