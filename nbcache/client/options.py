"""How a load is asked for, and what it comes to. No torch at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nbcache.errors import InvalidOption
from nbcache.manifest import Manifest, item_bytes

if TYPE_CHECKING:
    import torch

    from nbcache.client.slabs import SlabMap

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


@dataclass(frozen=True)
class Loaded:
    """What a load came to: tensors that keep what is below them alive."""

    tensors: dict[str, torch.Tensor]
    key: str
    name: str
    device: torch.device
    manifest: Manifest
    private_bytes: int
    hit: bool
    slab: SlabMap | None = None
    read: bool = True
    """Whether files were read, where it was no hit: a slab may be filled from the host copy alone."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; what lies below several of them counts once."""
        if not self.manifest.views:
            return sum(tensor.nbytes for tensor in self.tensors.values())
        names = {view.extent: view.name for view in self.manifest.views}
        return sum(
            self.tensors[names.get(number, extent.name)].element_size() * (extent.nbytes // item_bytes(extent.dtype))
            for number, extent in enumerate(self.manifest.tensors)
        )
