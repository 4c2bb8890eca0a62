"""Manifests: what holds together passes the check, each kind of lie fails it, and keys follow the bytes."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbcache.errors import ProtocolError
from nbcache.layout import LAYOUT_VERSION, plan_layout
from nbcache.manifest import (
    DTYPE_BITS,
    MAX_EXTENT_BYTES,
    Extent,
    Fingerprint,
    Manifest,
    Member,
    View,
    decode_manifest,
    each_view,
    encode_manifest,
    key_of,
    nbytes_of,
    place_tensors,
)

MEMBER = Member("/m.safetensors", Fingerprint(1, 2, 1000, 4, 5))


def honest(*shapes: tuple[int, ...]) -> Manifest:
    tensors, offset = [], 0
    for number, shape in enumerate(shapes or ((3, 5), (7,), (0, 2), ())):
        nbytes = nbytes_of("F32", shape)
        assert nbytes is not None
        tensors.append(Extent(f"t{number}", "F32", shape, 0, offset, nbytes, 0))
        offset += nbytes
    return place_tensors(tensors, [MEMBER], {"format": "pt"})


def edited(manifest: Manifest, **fields: object) -> Manifest:
    first = msgspec.structs.replace(manifest.tensors[0], **fields)
    return msgspec.structs.replace(manifest, tensors=(first, *manifest.tensors[1:]))


def test_an_honest_manifest_passes_and_counts_its_bytes():
    manifest = honest()
    manifest.check()
    assert manifest.nbytes == (15 + 7 + 0 + 1) * 4
    assert manifest.layout_version == LAYOUT_VERSION


def test_tensors_are_placed_by_the_planner_and_keep_their_order():
    manifest = honest((1000,), (1,), (0,), (500,))
    layout = plan_layout([tensor.nbytes for tensor in manifest.tensors])
    assert tuple(tensor.place for tensor in manifest.tensors) == layout.places
    assert manifest.extent_bytes == layout.extent_bytes
    assert [tensor.name for tensor in manifest.tensors] == ["t0", "t1", "t2", "t3"]


def test_a_manifest_without_tensors_passes():
    place_tensors([], [MEMBER], {}).check()


def test_without_members_files_and_offsets_mean_nothing():
    msgspec.structs.replace(edited(honest(), file=9, offset=1 << 50), members=()).check()


LIES = {
    "another layout": (lambda m: msgspec.structs.replace(m, layout_version=LAYOUT_VERSION + 1), "layout version 3, expected 2"),
    "no extent": (lambda m: msgspec.structs.replace(m, extent_bytes=0), "extent of 0"),
    "negative extent": (lambda m: msgspec.structs.replace(m, extent_bytes=-512), "extent of -512"),
    "absurd extent": (lambda m: msgspec.structs.replace(m, extent_bytes=MAX_EXTENT_BYTES + 1), "extent of"),
    "too small an extent": (lambda m: msgspec.structs.replace(m, extent_bytes=512), r"ends at byte \d+ of 512"),
    "one name twice": (lambda m: edited(m, name="t1"), "two tensors of one name"),
    "unknown dtype": (lambda m: edited(m, dtype="F33"), "'t0' F33"),
    "another dtype": (lambda m: edited(m, dtype="F16"), "'t0' F16"),
    "another shape": (lambda m: edited(m, shape=(3, 6)), r"'t0' F32\[3, 6\] in 60 bytes"),
    "negative shape": (lambda m: edited(m, shape=(-3, -5)), "'t0'"),
    "overflowing shape": (lambda m: edited(m, shape=(1 << 63, 1 << 63)), "'t0'"),
    "more bytes": (lambda m: edited(m, nbytes=64), "'t0'"),
    "negative bytes": (lambda m: edited(m, nbytes=-60), "'t0'"),
    "unaligned": (lambda m: edited(m, place=1), "at place 1, not a multiple"),
    "negative place": (lambda m: edited(m, place=-512), "at place -512"),
    "beyond the extent": (lambda m: edited(m, place=m.extent_bytes), "ends at byte"),
    "overlap": (lambda m: edited(m, place=m.tensors[1].place), "'t0' and 't1' overlap|'t1' and 't0' overlap"),
    "no such file": (lambda m: edited(m, file=1), "in file 1 of 1"),
    "negative file": (lambda m: edited(m, file=-1), "in file -1 of 1"),
    "beyond the file": (lambda m: edited(m, offset=941), "leaves its file of 1000"),
    "before the file": (lambda m: edited(m, offset=-1), "leaves its file"),
}


def viewed(manifest, **fields):
    """The manifest with one view of its first tensor, 15 elements, with these fields."""
    view = msgspec.structs.replace(View("v", 0, 0, (5, 3), (1, 5), 0), **fields)
    return msgspec.structs.replace(manifest, views=(view,))


LIES |= {
    "a view of no extent": (lambda m: viewed(m, extent=9), "view 'v' of extent 9 of"),
    "a view of a negative extent": (lambda m: viewed(m, extent=-1), "view 'v' of extent -1"),
    "a view beyond its extent": (lambda m: viewed(m, offset=1), r"view 'v', \[5, 3\] by \[1, 5\] from 1, leaves its 60 bytes"),
    "a view before its extent": (lambda m: viewed(m, offset=-1), "view 'v'"),
    "a view of larger strides": (lambda m: viewed(m, strides=(1, 6)), "view 'v'"),
    "a view of negative strides": (lambda m: viewed(m, strides=(1, -5)), "view 'v'"),
    "a view of negative shape": (lambda m: viewed(m, shape=(-5, -3)), "view 'v'"),
    "a view of too few strides": (lambda m: viewed(m, strides=(1,)), "view 'v'"),
    "an immense view": (lambda m: viewed(m, shape=(1 << 40, 1 << 40), strides=(0, 0)), "view 'v'"),
    "an empty view far away": (lambda m: viewed(m, shape=(0,), strides=(1,), offset=16), "view 'v'"),
    "one view twice": (lambda m: msgspec.structs.replace(m, views=viewed(m).views * 2), "'v' has the name of another tensor"),
    "a view of another's name": (lambda m: viewed(m, name="t1"), "'t1' has the name of another tensor"),
    "a view beyond the last": (lambda m: viewed(m, number=4), "'v' is number 4 of 4"),
    "a view before the first": (lambda m: viewed(m, number=-1), "'v' is number -1 of 4"),
    "views out of order": (
        lambda m: msgspec.structs.replace(m, views=(viewed(m, number=1).views[0], viewed(m, name="w").views[0])),
        "'w' is number 0 of 5, after 1",
    ),
}


def test_honest_views_pass_and_are_what_counts():
    manifest = viewed(honest())
    manifest.check()
    assert (manifest.count, honest().count) == (4, 4)
    assert [view.name for view in each_view(manifest)] == ["v", "t1", "t2", "t3"]
    two = msgspec.structs.replace(
        manifest, views=(viewed(honest(), number=1).views[0], viewed(honest(), name="w", number=4).views[0])
    )
    two.check()
    assert [view.name for view in each_view(two)] == ["t1", "v", "t2", "t3", "w"]
    assert [view.number for view in each_view(two)] == list(range(two.count))
    assert decode_manifest(encode_manifest(manifest)) == manifest
    viewed(honest(), shape=(1 << 40,), strides=(0,), offset=14).check()


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES.keys())
def test_a_lie_is_a_protocol_error_with_its_numbers(lie, message):
    with pytest.raises(ProtocolError, match=message):
        lie(honest()).check()


def test_the_last_byte_of_a_file_may_be_a_tensors():
    edited(honest(), offset=940).check()


def test_overlap_of_one_byte_is_seen():
    a, b = (Extent(name, "U8", (n,), 0, 0, n, place) for name, n, place in (("a", 513, 0), ("b", 1, 512)))
    with pytest.raises(ProtocolError, match="'a' and 'b' overlap at byte 512"):
        Manifest((a, b), (MEMBER,), {}, 2 << 20).check()


def test_empty_tensors_may_share_a_place():
    honest((0,), (0,), (4,), (0, 3)).check()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 40), max_size=3)), max_size=12))
def test_whatever_is_placed_passes_the_check(kinds):
    tensors, offset = [], 0
    for number, (dtype, shape) in enumerate(kinds):
        nbytes = nbytes_of(dtype, shape)
        if nbytes is not None:
            tensors.append(Extent(str(number), dtype, tuple(shape), 0, offset, nbytes, 0))
            offset += nbytes
    manifest = place_tensors(tensors, [Member("/x", Fingerprint(0, 0, offset, 0, 0))], {})
    manifest.check()
    assert decode_manifest(encode_manifest(manifest)) == manifest


# Bytes of a shape


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F32", (), 4),
        ("F32", (2, 3), 24),
        ("F32", (0, 1 << 62), 0),
        ("BOOL", (3,), 3),
        ("C128", (2,), 32),
        ("F4", (2,), 1),
        ("F4", (3,), None),
        ("F4", (), None),
        ("F4", (3, 2), 3),
        ("F32", (-1,), None),
        ("F32", (-1, -1), None),
        ("F32", (0, -1), None),
        ("F33", (1,), None),
        ("", (), None),
    ],
)
def test_bytes_of_a_shape(dtype, shape, nbytes):
    assert nbytes_of(dtype, shape) == nbytes


@pytest.mark.timeout(10)
def test_bytes_of_very_many_dimensions_are_not_multiplied_out():
    """Their product has millions of digits; the answer must come long before that."""
    assert nbytes_of("F32", [1 << 62] * 300_000) != 4


# On the wire


def test_a_manifest_survives_its_encoding():
    manifest = honest()
    assert decode_manifest(encode_manifest(manifest)) == manifest


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b"{", b"[" * 200_000, b'{"tensors":' * 50_000,
        b'{"tensors":[["a"]],"members":[],"metadata":{},"extent_bytes":1}',
        b'{"tensors":[],"members":[],"metadata":{"a":1},"extent_bytes":1}',
        b'{"tensors":[],"members":[],"metadata":{},"extent_bytes":1.5}',
        b'{"tensors":[],"members":[],"metadata":{"\xff":""},"extent_bytes":1}',
        b'{"tensors":[],"members":[],"metadata":{"a":"\\ud800"},"extent_bytes":1}',
        b'{"tensors":[["a","F32",[1.0],0,0,4,0]],"members":[],"metadata":{},"extent_bytes":1}',
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_a_protocol_error(payload):
    with pytest.raises(ProtocolError, match="not a manifest"):
        decode_manifest(payload)


# Keys


def test_a_key_does_not_depend_on_the_path():
    assert key_of([MEMBER]) == key_of([msgspec.structs.replace(MEMBER, path="/other")])


@pytest.mark.parametrize("field", Fingerprint.__struct_fields__)
def test_a_key_depends_on_all_that_a_stat_tells(field):
    other = msgspec.structs.replace(MEMBER.fingerprint, **{field: 99})
    assert key_of([msgspec.structs.replace(MEMBER, fingerprint=other)]) != key_of([MEMBER])


def test_a_key_depends_on_the_order_and_number_of_the_files():
    other = msgspec.structs.replace(MEMBER, fingerprint=Fingerprint(1, 3, 1000, 4, 5))
    keys = [key_of(members) for members in ([], [MEMBER], [MEMBER, MEMBER], [MEMBER, other], [other, MEMBER])]
    assert len(set(keys)) == len(keys)


def test_a_hash_stands_for_the_stat_but_not_for_the_size():
    named = msgspec.structs.replace(MEMBER, blob="a" * 64)
    moved = msgspec.structs.replace(named, fingerprint=Fingerprint(9, 9, 1000, 9, 9))
    longer = msgspec.structs.replace(named, fingerprint=Fingerprint(1, 2, 1001, 4, 5))
    assert key_of([named]) == key_of([moved])
    assert key_of([named]) != key_of([longer])
    assert key_of([named]) != key_of([MEMBER])


def test_a_fingerprint_is_what_the_system_says(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    found = os.stat(path)
    assert Fingerprint.of(found) == Fingerprint(found.st_dev, found.st_ino, 3, found.st_mtime_ns, found.st_ctime_ns)
