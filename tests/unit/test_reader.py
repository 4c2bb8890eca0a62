"""Reading files into memory: each byte once to its place, and nothing left behind however it ends."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbcache.daemon import reader
from nbcache.daemon.reader import PIECES_PER_READ, CopySource, FileSource, Read, Reader, Staging, plan_reads
from nbcache.errors import CheckpointChanged, CheckpointUnreadable
from nbcache.manifest import Extent, Fingerprint, Manifest, Member, place_tensors
from nbcache.memory.shared import SharedBlock

KIB, MIB = 1 << 10, 1 << 20


def manifest_of(files: list[tuple[Path, list[tuple[int, int]]]]) -> Manifest:
    """Tensors of bytes at these (offset, bytes) of these files."""
    members = [Member(str(path), Fingerprint.of(path.stat())) for path, _ in files]
    tensors = [
        Extent(f"{number}.{i}", "U8", (nbytes,), number, offset, nbytes, 0)
        for number, (_, ranges) in enumerate(files)
        for i, (offset, nbytes) in enumerate(ranges)
    ]
    return place_tensors(tensors, members, {})


def paper_manifest(ranges: list[list[tuple[int, int]]]) -> Manifest:
    members = [Member(f"/{i}", Fingerprint(0, i, 1 << 40, 0, 0)) for i in range(len(ranges))]
    tensors = [
        Extent(f"{number}.{i}", "U8", (nbytes,), number, offset, nbytes, 0)
        for number, of_file in enumerate(ranges)
        for i, (offset, nbytes) in enumerate(of_file)
    ]
    return place_tensors(tensors, members, {})


@st.composite
def checkpoints(draw):
    """Per file: tensors one after the other, with a gap here and there, in any order."""
    files = []
    for _ in range(draw(st.integers(1, 3))):
        offset, ranges = draw(st.integers(0, 100)), []
        for nbytes, gap in draw(st.lists(st.tuples(st.integers(0, 600), st.sampled_from([0, 0, 0, 7])), max_size=12)):
            ranges.append((offset, nbytes))
            offset += nbytes + gap
        files.append(draw(st.permutations(ranges)))
    return files


def bytes_read(reads: list[Read], start: int = 0) -> dict[tuple[int, int, int], int]:
    """How often (file, offset, place in the entry) is read, for each byte."""
    found: dict[tuple[int, int, int], int] = {}
    for one in reads:
        at = one.offset
        for place, nbytes in one.pieces:
            for i in range(nbytes):
                byte = (one.file, at, start + place + i)
                found[byte] = found.get(byte, 0) + 1
                at += 1
    return found


def bytes_wanted(manifest: Manifest) -> dict[tuple[int, int, int], int]:
    return {(t.file, t.offset + i, t.place + i): 1 for t in manifest.tensors for i in range(t.nbytes)}


@settings(max_examples=300, deadline=None)
@given(checkpoints(), st.integers(1, 700))
def test_every_byte_of_every_tensor_is_read_once_to_its_place(files, chunk_bytes):
    manifest = paper_manifest(files)
    reads = plan_reads(manifest.tensors, chunk_bytes=chunk_bytes)
    assert bytes_read(reads) == bytes_wanted(manifest)


@st.composite
def cuts(draw):
    """A checkpoint, and its extent cut into areas wherever: in the middle of a tensor, between two, in the padding."""
    manifest = paper_manifest(draw(checkpoints()))
    used = max((tensor.place + tensor.nbytes for tensor in manifest.tensors), default=0)
    inside = draw(st.lists(st.integers(1, used + 100), max_size=6))
    edges = [tensor.place for tensor in manifest.tensors] + [tensor.place + tensor.nbytes for tensor in manifest.tensors]
    at_edges = draw(st.lists(st.sampled_from(edges), max_size=3)) if edges else []
    bounds = sorted({0, *inside, *at_edges, manifest.extent_bytes})
    return manifest, list(itertools.pairwise(bounds))


@settings(max_examples=400, deadline=None)
@given(cuts(), st.integers(1, 700))
def test_however_the_extent_is_cut_each_byte_is_read_once_to_its_place(cut, chunk_bytes):
    manifest, areas = cut
    found: dict[tuple[int, int, int], int] = {}
    for start, end in areas:
        reads = plan_reads(manifest.tensors, start, end, chunk_bytes)
        for byte, times in bytes_read(reads, start).items():
            assert start <= byte[2] < end, "outside its area"
            found[byte] = found.get(byte, 0) + times
    assert found == bytes_wanted(manifest)


@settings(max_examples=300, deadline=None)
@given(cuts(), st.integers(1, 700))
def test_reads_keep_to_their_limits_and_to_file_order(cut, chunk_bytes):
    manifest, areas = cut
    for start, end in areas:
        reads = plan_reads(manifest.tensors, start, end, chunk_bytes)
        for one in reads:
            assert 0 < sum(nbytes for _, nbytes in one.pieces) <= chunk_bytes
            assert all(nbytes > 0 for _, nbytes in one.pieces)
            assert len(one.pieces) <= PIECES_PER_READ
        assert [(r.file, r.offset) for r in reads] == sorted((r.file, r.offset) for r in reads)


def test_a_read_scatters_to_no_more_pieces_than_the_system_takes():
    reads = plan_reads(paper_manifest([[(i, 1) for i in range(PIECES_PER_READ * 2 + 3)]]).tensors)
    assert [len(one.pieces) for one in reads] == [PIECES_PER_READ, PIECES_PER_READ, 3]


def test_neighbours_share_a_read_and_a_gap_ends_it():
    manifest = paper_manifest([[(0, 10), (10, 5), (20, 5)], [(0, 5)]])
    place = {tensor.name: tensor.place for tensor in manifest.tensors}
    assert plan_reads(manifest.tensors) == [
        Read(0, 0, ((place["0.0"], 10), (place["0.1"], 5))),
        Read(0, 20, ((place["0.2"], 5),)),
        Read(1, 0, ((place["1.0"], 5),)),
    ]


def test_a_large_tensor_is_read_in_chunks():
    reads = plan_reads(paper_manifest([[(100, 25)]]).tensors, chunk_bytes=10)
    assert [(r.offset, r.pieces) for r in reads] == [
        (100, ((0, 10),)), (110, ((10, 10),)), (120, ((20, 5),)),
    ]  # fmt: skip


def test_an_area_begins_and_ends_in_the_middle_of_a_tensor():
    tensors = paper_manifest([[(100, 25)]]).tensors
    assert plan_reads(tensors, 0, 10) == [Read(0, 100, ((0, 10),))]
    assert plan_reads(tensors, 10, 20) == [Read(0, 110, ((0, 10),))]
    assert plan_reads(tensors, 20, 600) == [Read(0, 120, ((0, 5),))]
    assert plan_reads(tensors, 25, 600) == []


def test_two_tensors_over_the_same_bytes_are_both_read():
    reads = plan_reads(paper_manifest([[(0, 10), (0, 10)]]).tensors)
    assert sorted(place for one in reads for place, _ in one.pieces) == [0, 512]


def test_nothing_to_read_needs_no_read():
    assert plan_reads(paper_manifest([[]]).tensors) == []
    assert plan_reads(paper_manifest([[(0, 0), (5, 0)]]).tensors) == []


# Real files


def write(path: Path, nbytes: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(nbytes))
    return path


def file_source(manifest: Manifest, flags: int = os.O_RDONLY, paths: list[str] | None = None) -> FileSource:
    return FileSource(manifest, [os.open(path, flags) for path in paths or [m.path for m in manifest.members]])


class Attempt:
    """A staging of real files into real memory, in areas of ``area_bytes``; :meth:`run` proves that nothing is left of it."""

    def __init__(
        self,
        manifest: Manifest,
        flags: int = os.O_RDONLY,
        paths: list[str] | None = None,
        area_bytes: int = 0,
        source: FileSource | CopySource | None = None,
    ) -> None:
        self.manifest = manifest
        self.source = source or file_source(manifest, flags, paths)
        self.staging = Staging(self.source)
        self.area_bytes = area_bytes or manifest.extent_bytes
        self.result = b""
        self.starts: list[int] = []
        """Of the areas that were asked for."""

    def _areas(self, maps: list[mmap.mmap]) -> Iterator[tuple[int, memoryview]]:
        for start in range(0, self.manifest.extent_bytes, self.area_bytes):
            maps.append(mmap.mmap(-1, min(self.area_bytes, self.manifest.extent_bytes - start)))
            with memoryview(maps[-1]) as view:
                self.starts.append(start)
                yield start, view

    def run(self, threads: int = 2) -> None:
        files = self.source.files
        assert files
        maps: list[mmap.mmap] = []
        areas = self._areas(maps)
        try:
            self.staging.run(areas, threads)
        finally:
            areas.close()
            self.result = b"".join(maps)
            for area in maps:
                area.close()  # BufferError if a slice of it were left
            assert self.source.files == ()
            for fd in files:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_staging_brings_each_tensor_to_its_place(tmp_path, threads):
    one, two = write(tmp_path / "one", 20 * MIB, 1), write(tmp_path / "two", 3 * MIB, 2)
    manifest = manifest_of([(one, [(8, 1000), (1008, 17 * MIB), (18 * MIB, 3)]), (two, [(0, 3 * MIB), (3 * MIB, 0)])])
    attempt = Attempt(manifest)
    attempt.run(threads)
    for tensor in manifest.tensors:
        source = (one, two)[tensor.file].read_bytes()
        assert attempt.result[tensor.place :][: tensor.nbytes] == source[tensor.offset :][: tensor.nbytes]
    assert attempt.staging.staged_bytes == attempt.staging.total_bytes == manifest.nbytes


@pytest.mark.parametrize("area_bytes", [2 * MIB, 5 * MIB + 512, 1 << 30])
def test_staging_fills_one_area_after_the_other(tmp_path, area_bytes):
    one, two = write(tmp_path / "one", 20 * MIB, 1), write(tmp_path / "two", 3 * MIB, 2)
    manifest = manifest_of([(one, [(8, 1000), (1008, 17 * MIB), (18 * MIB, 3)]), (two, [(0, 3 * MIB), (3 * MIB, 0)])])
    attempt = Attempt(manifest, area_bytes=area_bytes)
    attempt.run()
    assert attempt.starts == list(range(0, manifest.extent_bytes, area_bytes))
    for tensor in manifest.tensors:
        source = (one, two)[tensor.file].read_bytes()
        assert attempt.result[tensor.place :][: tensor.nbytes] == source[tensor.offset :][: tensor.nbytes]
    assert attempt.staging.staged_bytes == attempt.staging.total_bytes == manifest.nbytes


def test_an_area_is_full_before_the_next_is_asked_for(tmp_path):
    """A caller may hand a block out as soon as the next one is asked of it."""
    path = write(tmp_path / "a", 6 * MIB)
    manifest = manifest_of([(path, [(0, 6 * MIB)])])
    staging = Staging(file_source(manifest))
    whole, seen = bytearray(6 * MIB), []

    def areas() -> Iterator[tuple[int, memoryview]]:
        for start in range(0, 6 * MIB, MIB):
            with memoryview(whole)[start : start + MIB] as view:
                yield start, view
            seen.append(whole[: start + MIB] == path.read_bytes()[: start + MIB])

    staging.run(areas(), 4)
    assert seen == [True] * 6


def test_an_error_of_whoever_makes_the_areas_ends_the_staging_and_closes_the_files(tmp_path):
    path = write(tmp_path / "a", 2 * MIB)
    source = file_source(manifest_of([(path, [(0, 2 * MIB)])]))

    def areas() -> Iterator[tuple[int, memoryview]]:
        with memoryview(bytearray(MIB)) as view:
            yield 0, view
        raise MemoryError("no second area")

    with pytest.raises(MemoryError, match="no second area"):
        Staging(source).run(areas(), 2)
    assert source.files == ()


def test_no_area_is_asked_for_after_a_failure(tmp_path):
    path = write(tmp_path / "a", MIB)
    attempt = Attempt(manifest_of([(path, [(0, 4 * MIB)])]), area_bytes=2 * MIB)
    with pytest.raises(CheckpointChanged):
        attempt.run()
    assert attempt.starts == [0]


# A host copy as the source


def sealed(payload: bytes) -> SharedBlock:
    block = SharedBlock.create("copy", len(payload))
    with block.writable() as view:
        view[:] = payload
    block.seal()
    return block


@pytest.mark.parametrize("area_bytes", [4 * KIB, 100_000, 1 << 30])
def test_a_copy_is_copied_byte_for_byte(tmp_path, area_bytes):
    payload = random.Random(3).randbytes(MIB + 512)
    block = sealed(payload)
    source = CopySource("a copy", block.fd, len(payload))
    manifest = Manifest((), (), {}, len(payload))
    block.close()  # the source has a descriptor of its own
    attempt = Attempt(manifest, source=source, area_bytes=area_bytes)
    attempt.run()
    assert attempt.result == payload
    assert attempt.staging.staged_bytes == attempt.staging.total_bytes == len(payload)


def test_a_copy_that_ends_too_soon_is_called_by_its_name():
    block = sealed(bytes(1000))
    source = CopySource("a copy", block.fd, 2000)
    block.close()
    with pytest.raises(CheckpointChanged, match="a copy: ends at byte 1000"):
        Attempt(Manifest((), (), {}, 2000), source=source).run()


def test_closing_a_copy_source_leaves_the_copy_open():
    block = sealed(bytes(1000))
    source = CopySource("a copy", block.fd, 1000)
    (fd,) = source.files
    assert fd != block.fd
    assert not os.get_inheritable(fd), "I8"
    source.close()
    source.close()
    assert os.fstat(block.fd).st_size == 1000
    block.close()


# However it goes


def test_short_reads_are_continued(tmp_path, monkeypatch):
    """The system may return less than it was asked for, in the middle of a piece or between two."""
    real = os.preadv

    def meagre(fd, buffers, offset):
        first, *_rest = buffers
        with first[:7] as part:
            return real(fd, [part], offset)

    monkeypatch.setattr(reader.os, "preadv", meagre)
    path = write(tmp_path / "a", 1000)
    manifest = manifest_of([(path, [(0, 100), (100, 33), (133, 1), (134, 500)])])
    attempt = Attempt(manifest)
    attempt.run()
    for tensor in manifest.tensors:
        assert attempt.result[tensor.place :][: tensor.nbytes] == path.read_bytes()[tensor.offset :][: tensor.nbytes]
    assert attempt.staging.staged_bytes == manifest.nbytes


def change(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    elif how == "touched":
        os.utime(path, ns=(1, 1))
    else:
        with path.open("r+b") as file:
            file.write(b"!")


CHANGES = ["truncated", "emptied", "grown", "touched", "overwritten"]


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changed_before_it_was_read_is_not_staged(tmp_path, how):
    path = write(tmp_path / "a", 4 * MIB)
    attempt = Attempt(manifest_of([(path, [(0, 4 * MIB)])]))
    change(path, how)
    with pytest.raises(CheckpointChanged, match=re.escape(str(path))):
        attempt.run()


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_not_staged(tmp_path, monkeypatch, how):
    """I6. It changes at the third read: before the end, and after the first look at it."""
    path = write(tmp_path / "a", 40 * MIB)
    attempt = Attempt(manifest_of([(path, [(0, 40 * MIB)])]))
    real, count, lock = os.preadv, iter(range(1000)), threading.Lock()

    def changing(fd, buffers, offset):
        with lock:
            if next(count) == 2:
                change(path, how)
        return real(fd, buffers, offset)

    monkeypatch.setattr(reader.os, "preadv", changing)
    with pytest.raises(CheckpointChanged, match=re.escape(str(path))):
        attempt.run()


def test_a_file_replaced_under_its_name_is_read_as_it_was_opened(tmp_path):
    path = write(tmp_path / "a", 1000, 1)
    kept = tmp_path / "kept"
    kept.hardlink_to(path)  # before the fingerprint: its ctime stays when the name goes
    first = path.read_bytes()
    manifest = manifest_of([(path, [(0, 1000)])])
    attempt = Attempt(manifest, paths=[str(kept)])
    assert write(tmp_path / "b", 1000, 2).read_bytes() != first
    attempt.run()
    assert attempt.result[:1000] == first


def test_a_manifest_that_promises_more_than_the_file_has_is_not_staged(tmp_path):
    """The daemon checks that first; the reader does not rely on it."""
    path = write(tmp_path / "a", 1000)
    manifest = manifest_of([(path, [(0, 5000)])])
    with pytest.raises(CheckpointChanged, match=re.escape(f"{path}: ends at byte 1000, sooner than when it was described")):
        Attempt(manifest).run()


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH])
def test_a_file_that_cannot_be_read_is_unreadable(tmp_path, flags):
    path = write(tmp_path / "a", 1000)
    with pytest.raises(CheckpointUnreadable, match=f"{re.escape(str(path))}: read failed at byte 0: Bad file desc"):
        Attempt(manifest_of([(path, [(0, 1000)])]), flags).run()


def test_a_folder_is_unreadable(tmp_path):
    manifest = manifest_of([(tmp_path, [(0, 1)])])
    with pytest.raises(CheckpointUnreadable, match="Is a directory"):
        Attempt(manifest).run()


def test_one_unreadable_file_of_several_ends_the_staging(tmp_path):
    paths = [write(tmp_path / name, MIB) for name in "abc"]
    manifest = manifest_of([(path, [(0, MIB)]) for path in paths])
    files = [os.open(path, os.O_WRONLY if path is paths[1] else os.O_RDONLY) for path in paths]
    attempt = Attempt(manifest, source=FileSource(manifest, files))
    with pytest.raises(CheckpointUnreadable, match=re.escape(str(paths[1]))):
        attempt.run()


def test_too_few_files_are_noticed_and_closed(tmp_path):
    paths = [write(tmp_path / name, 10) for name in "ab"]
    attempt = Attempt(manifest_of([(path, [(0, 10)]) for path in paths]), paths=[str(paths[0])])
    with pytest.raises(ValueError, match="zip"):
        attempt.run()


def test_a_cancelled_staging_reads_nothing(tmp_path):
    path = write(tmp_path / "a", MIB)
    attempt = Attempt(manifest_of([(path, [(0, MIB)])]))
    attempt.staging.cancel()
    with pytest.raises(CheckpointUnreadable, match="the daemon stopped while reading"):
        attempt.run()
    assert attempt.staging.staged_bytes == 0


def test_a_staging_cancelled_in_the_middle_ends_at_the_next_chunk(tmp_path, monkeypatch):
    path = write(tmp_path / "a", 40 * MIB)
    attempt = Attempt(manifest_of([(path, [(0, 40 * MIB)])]))
    real = os.preadv

    def cancelling(fd, buffers, offset):
        attempt.staging.cancel()
        return real(fd, buffers, offset)

    monkeypatch.setattr(reader.os, "preadv", cancelling)
    with pytest.raises(CheckpointUnreadable, match="the daemon stopped"):
        attempt.run(threads=1)
    assert attempt.staging.staged_bytes == reader.CHUNK_BYTES


def test_a_staging_cancelled_between_two_areas_begins_no_other(tmp_path):
    path = write(tmp_path / "a", 4 * MIB)
    manifest = manifest_of([(path, [(0, 4 * MIB)])])
    source = file_source(manifest)
    staging = Staging(source)

    def areas() -> Iterator[tuple[int, memoryview]]:
        with memoryview(bytearray(2 * MIB)) as view:
            yield 0, view
            staging.cancel()
            yield 2 * MIB, view

    with pytest.raises(CheckpointUnreadable, match="the daemon stopped"):
        staging.run(areas(), 2)
    assert staging.staged_bytes == 2 * MIB
    assert source.files == ()


def test_closing_the_files_twice_closes_them_once(tmp_path):
    path = write(tmp_path / "a", 10)
    source = file_source(manifest_of([(path, [(0, 10)])]))
    staging = Staging(source)
    (fd,) = source.files
    staging.close()
    reused = os.open(path, os.O_RDONLY)
    assert reused == fd
    staging.close()
    source.close()
    assert os.fstat(reused)
    os.close(reused)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(checkpoints(), st.integers(1, 7))
def test_any_layout_of_tensors_is_staged_whole(tmp_path_factory, files, areas):
    folder = tmp_path_factory.mktemp("any")
    paths = [write(folder / str(i), 9000, i) for i in range(len(files))]
    manifest = manifest_of(list(zip(paths, files, strict=True)))
    attempt = Attempt(manifest, area_bytes=manifest.extent_bytes // areas + 1)
    attempt.run()
    for tensor in manifest.tensors:
        source = paths[tensor.file].read_bytes()
        assert attempt.result[tensor.place :][: tensor.nbytes] == source[tensor.offset :][: tensor.nbytes]


# In the background


def in_background(background: Reader, staging: Staging, fill: Callable[[], None]) -> Exception | None:
    done = threading.Event()
    errors: list[Exception | None] = []

    def told(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    background.start(staging, fill, told)
    assert done.wait(10)
    return errors[0]


def test_the_reader_tells_how_it_ended_and_closes_the_files(tmp_path):
    path = write(tmp_path / "a", 10)
    manifest = manifest_of([(path, [(0, 10)])])
    background = Reader(threads=2)
    try:
        for fails in (False, True):
            source = file_source(manifest)
            staging = Staging(source)

            def fill(fails: bool = fails) -> None:
                if fails:
                    raise RuntimeError("before it even began")

            error = in_background(background, staging, fill)
            assert isinstance(error, RuntimeError) is fails
            assert source.files == ()
    finally:
        background.close()


def test_closing_the_reader_cancels_what_runs(tmp_path):
    path = write(tmp_path / "a", 10)
    source = file_source(manifest_of([(path, [(0, 10)])]))
    staging = Staging(source)
    background = Reader(threads=1)
    running, told = threading.Event(), []

    def fill() -> None:
        running.set()
        assert staging._cancelled.wait(10)
        with memoryview(bytearray(1000)) as view:
            staging.run([(0, view)], 1)

    background.start(staging, fill, told.append)
    assert running.wait(10)
    background.close()
    assert [type(error) for error in told] == [CheckpointUnreadable]
    assert source.files == ()


def test_a_member_that_is_another_file_is_changed_in_every_respect(tmp_path):
    path = write(tmp_path / "a", 10)
    member = Member(str(path), Fingerprint.of(path.stat()))
    fd = os.open(path, os.O_RDONLY)
    try:
        reader.check_unchanged(fd, member)
        for name in Fingerprint.__struct_fields__:
            other = msgspec.structs.replace(member.fingerprint, **{name: getattr(member.fingerprint, name) + 1})
            with pytest.raises(CheckpointChanged, match="10 now"):
                reader.check_unchanged(fd, msgspec.structs.replace(member, fingerprint=other))
    finally:
        os.close(fd)
