"""What the names in a torch pickle stand for: storages, tensors, and the few functions that describe them.

Pure: a tensor is described, never made. Every result is small or made of the arguments themselves, so that a pickle cannot ask
for much by saying little. Source: ``torch/_utils.py`` (``_rebuild_*``) and ``torch/_weights_only_unpickler.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbcache.errors import UnsupportedFormat
from nbcache.manifest import DTYPE_BITS, TORCH_NAMES, elements_of

REMEDY = "save the tensors alone: torch.save(model.state_dict(), ...)"

MAX_DIMENSIONS = 64
"""More than torch computes with."""

DTYPES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}
"""A manifest's dtype by the name of torch's."""

STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64", "torch.IntStorage": "I32", "torch.ShortStorage": "I16", "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL", "torch.ComplexDoubleStorage": "C128",
    "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
"""A manifest's dtype by the class of torch's storages."""

FOREIGN = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (meta device)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a foreign device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a foreign device",
}
"""What torch rebuilds and this reader does not, because it has no plain bytes in the file."""


class Broken(Exception):
    """The pickle is not one, or what it describes is none."""


@dataclass(frozen=True, slots=True)
class Global:
    """A dotted name that the pickle uses."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes of the archive, by its key."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor over a storage. ``offset`` and ``strides`` count elements of ``dtype``, ``shape`` is as torch has it."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def find(module: str, name: str) -> Global:
    """The global of this name. UnsupportedFormat, with the reason, if it is none of those that describe tensors."""
    full = f"{'builtins' if module == '__builtin__' else module}.{name}"  # as Python 2 called it, and protocol 2 does
    if full in FOREIGN:
        raise UnsupportedFormat(f"holds {FOREIGN[full]}, which has no plain bytes to map; {REMEDY}")
    if full not in _KNOWN:
        raise UnsupportedFormat(f"its pickle needs {full[:200]!r}, code that nbcache does not run; {REMEDY}")
    return Global(full)


def call(function: object, arguments: object) -> object:
    """What calling this global describes. Broken if it cannot be called, or not so."""
    if not isinstance(function, Global) or function.name not in _CALLS or not isinstance(arguments, tuple):
        raise Broken("a call of what cannot be called")
    return _CALLS[function.name](*arguments)


def find_storage(identity: object) -> Storage:
    """The storage that a persistent id names: tag, class, key, device, number of elements. Broken if it is none."""
    if not isinstance(identity, tuple) or len(identity) != 5:
        raise Broken("a persistent id that is none")
    tag, kind, key, _device, count = identity
    dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
    if tag != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise Broken("a storage that is none")
    return Storage(key, dtype, count * DTYPE_BITS[dtype] // 8)


def _tensor(storage: object, offset: object, shape: object, strides: object, dtype: str | None = None) -> Tensor:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise Broken("a tensor that is none")
    sizes, steps = _counts(shape), _counts(strides)
    if len(sizes) != len(steps) or elements_of(sizes) is None:
        raise Broken("a tensor of an impossible shape")
    return Tensor(storage, dtype or storage.dtype, sizes, steps, offset)


def _counts(value: object = ()) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS:
        raise Broken("sizes that are none")
    if not all(type(number) is int and number >= 0 for number in value):
        raise Broken("sizes that are no counts")
    return value


def _tensor_v2(
    storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object, bits: object = None
) -> Tensor:
    _check_bits(bits)
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    bits: object = None,
) -> Tensor:
    _check_bits(bits)
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise Broken("a tensor without a dtype")
    return _tensor(storage, offset, shape, strides, DTYPES[dtype.name])


def _check_bits(bits: object) -> None:
    if not isinstance(bits, dict | None) or (bits and len(bits) > 2):
        raise Broken("a tensor of unknown properties")
    if bits and any(bits.values()):
        raise UnsupportedFormat(
            "holds a lazily conjugated or negated tensor; call resolve_conj() and resolve_neg() before saving it"
        )


def _tensor_of_type(function: object, kind: object, arguments: object, _state: object) -> object:
    """A tensor or parameter with attributes, which are not weights."""
    if not isinstance(kind, Global) or kind.name not in _TENSOR_TYPES:
        raise Broken("a tensor of a type of its own")
    if not isinstance(function, Global) or function.name not in _TENSORS or not isinstance(arguments, tuple):
        raise Broken("a tensor that is none")
    return _TENSORS[function.name](*arguments)


def _text_of_bytes(text: object, _encoding: object = "latin1") -> object:
    """Bytes, as the text that stands for them in protocol 2."""
    if not isinstance(text, str):
        raise Broken("bytes that are none")
    return text


def _ordered_dict() -> object:
    """An empty one: torch fills it by instructions of their own, and what it would be made from is not copied."""
    return {}


def _same(value: object) -> object:
    """A set or a counter, as the list or dict that it is made from."""
    if not isinstance(value, list | dict):
        raise Broken("a collection that is none")
    return value


def _complex(real: object, imaginary: object) -> object:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise Broken("a complex number that is none")
    return str(complex(real, imaginary))


def _device(kind: object, index: object = None) -> object:
    if not isinstance(kind, str) or not isinstance(index, int | None) or len(kind) > MAX_DIMENSIONS:
        raise Broken("a device that is none")
    return kind if index is None else f"{kind}:{index}"


_TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
}
_TENSOR_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})

_CALLS: dict[str, Callable[..., object]] = _TENSORS | {
    "torch._utils._rebuild_parameter": lambda tensor, _grad, _hooks: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, _grad, _hooks, _state: tensor,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch.Size": _counts,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _text_of_bytes,
    "builtins.bytearray": _text_of_bytes,
    "builtins.set": _same,
    "collections.Counter": _same,
    "builtins.complex": _complex,
}

_KNOWN = frozenset({*_CALLS, *DTYPES, *STORAGES, *_TENSOR_TYPES})
