"""Every error nbcache raises on purpose, as one tree.

::

    NBCacheError
    ├── CheckpointError            the file or folder that was named
    │   ├── CheckpointNotFound       no such file, folder or cached name
    │   ├── CheckpointUnreadable     it is there, but the system refuses to read it
    │   ├── CheckpointInvalid        its content breaks its format
    │   ├── CheckpointIncomplete     a shard is missing, or lacks what the index promises
    │   ├── CheckpointChanged        it changed while it was read
    │   ├── ModelUnknown             its config names a class that the installed libraries lack
    │   └── ModelMismatch            its tensors are not those of the class that its config names
    ├── UnsupportedFormat          a file or tensor of a kind nbcache does not serve
    ├── PackageMissing             an optional package that is needed is not installed
    ├── HubError                   a model hub could not give what was named
    │   ├── HubDenied                log in, or accept the licence
    │   └── HubUnreachable           no connection, or none is wanted
    ├── EntryNotFound              no cached entry of that name
    ├── EntryInUse                 an entry that is leased or pinned was to be evicted
    ├── HostMemoryFull             the host tier has no room that policy may free
    ├── DeviceMemoryFull           a GPU has no room for a slab
    ├── DriverError                the GPU driver refused something
    ├── InvalidName                a name that cannot be a name
    ├── InvalidOption              a device, share mode, dtype or size that does not exist
    ├── LoraError                  a LoRA, and the pipeline it was to go into
    │   ├── LoraMismatch             it was made for another architecture
    │   ├── LoraFused                the adapter is fused into the base weights
    │   └── AdapterNotFound          the pipeline has no adapter of that name
    ├── WeightsReleased            a released ``Weights`` was asked for a tensor
    ├── DaemonError                the companion process
    │   ├── DaemonUnavailable        it does not run and could not be started
    │   ├── DaemonLost               it went away in the middle of a request
    │   ├── DaemonUnresponsive       it kept silent for longer than the timeout
    │   └── VersionMismatch          it speaks another protocol
    ├── ProtocolError              a message that breaks the protocol
    ├── TopicNotFound              `nbcache help` has no page of that name
    ├── KernelSpecError            a kernelspec that cannot be installed or removed
    ├── BenchmarkFailed            a measurement could not be made, or measured something else
    └── UnsupportedPlatform        not Linux

Messages name the object, the numbers and the remedy. Over the wire an error travels as its class name and message
(:func:`named`), so the same mistake reads the same in the API, the magics and the command line.
"""

from __future__ import annotations


class NBCacheError(Exception):
    """Root of every error that nbcache raises on purpose."""


class CheckpointError(NBCacheError):
    """The file or folder that was named cannot be served."""


class CheckpointNotFound(CheckpointError):
    """There is no such file or folder, and nothing cached under that name."""


class CheckpointUnreadable(CheckpointError):
    """The file exists, but the operating system refuses to read it."""


class CheckpointInvalid(CheckpointError):
    """The file's content breaks the format that it claims."""


class CheckpointIncomplete(CheckpointError):
    """A shard is missing, or lacks a tensor that the index promises."""


class CheckpointChanged(CheckpointError):
    """A file changed between the moment it was described and the end of its reading."""


class ModelUnknown(CheckpointError):
    """A config names a class that the installed libraries do not have."""


class ModelMismatch(CheckpointError):
    """The tensors of a checkpoint are not those of the model that its config describes."""


class PackageMissing(NBCacheError):
    """An optional package is needed and not installed, or too old."""


class HubError(NBCacheError):
    """A model hub could not give what was named."""


class HubDenied(HubError):
    """The hub wants a login, or an accepted licence."""


class HubUnreachable(HubError):
    """The hub could not be reached, or is not to be asked (``HF_HUB_OFFLINE``)."""


class UnsupportedFormat(NBCacheError):
    """A file or a tensor of a kind that nbcache does not serve."""


class EntryNotFound(NBCacheError):
    """No cached entry has that name."""


class EntryInUse(NBCacheError):
    """An entry that is leased or pinned was to be evicted."""


class HostMemoryFull(NBCacheError):
    """The host tier has no room for the entry, and policy may not free enough."""


class DeviceMemoryFull(NBCacheError):
    """A GPU has no room for a slab, even without the idle ones."""


class DriverError(NBCacheError):
    """The GPU driver is not there, or refused something. Loads fall back to ordinary copies."""


class InvalidName(NBCacheError):
    """A string that cannot be the name of an entry."""


class InvalidOption(NBCacheError):
    """A device, share mode, dtype or size that does not exist."""


class LoraError(NBCacheError):
    """A LoRA cannot go into, or be changed in, the pipeline that was named. The pipeline is as it was."""


class LoraMismatch(LoraError):
    """The LoRA was made for another architecture than the pipeline's."""


class LoraFused(LoraError):
    """The adapter is fused into the base weights, where it can be neither swapped nor scaled nor taken out."""


class AdapterNotFound(LoraError):
    """The pipeline has no adapter of that name."""


class WeightsReleased(NBCacheError):
    """A released ``Weights`` was asked for a tensor."""


class DaemonError(NBCacheError):
    """The companion process cannot serve."""


class DaemonUnavailable(DaemonError):
    """The daemon does not run, and could not be (or was not to be) started."""


class DaemonLost(DaemonError):
    """The daemon closed the connection in the middle of a request."""


class DaemonUnresponsive(DaemonError):
    """The daemon kept silent for longer than the timeout."""


class VersionMismatch(DaemonError):
    """The daemon speaks another version of the protocol."""


class ProtocolError(NBCacheError):
    """A message that breaks the protocol. It costs the connection, never the daemon."""


class KernelSpecError(NBCacheError):
    """A kernelspec cannot be installed, or is not there to be removed, or is another kernel's."""


class TopicNotFound(NBCacheError):
    """``nbcache help`` has no page of that name."""


class BenchmarkFailed(NBCacheError):
    """A measurement could not be made, or what ran was not what was to be measured."""


class UnsupportedPlatform(NBCacheError):
    """nbcache needs Linux: memfd, pidfd and descriptor passing."""


def _tree(root: type[NBCacheError]) -> dict[str, type[NBCacheError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def named(name: str, message: str) -> NBCacheError:
    """The error of class ``name`` with ``message``; an unknown name gives the root class, so that newer peers can be read."""
    return _tree(NBCacheError).get(name, NBCacheError)(message)
