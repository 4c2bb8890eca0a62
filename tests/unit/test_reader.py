"""Reading files into memory: each byte once to its place, and nothing left behind however it ends."""

from __future__ import annotations

import mmap
import os
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbcache.daemon import reader
from nbcache.daemon.reader import PIECES_PER_READ, Read, Reader, Staging, plan_reads
from nbcache.errors import CheckpointChanged, CheckpointUnreadable
from nbcache.manifest import Extent, Fingerprint, Manifest, Member, place_tensors

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


@settings(max_examples=300, deadline=None)
@given(checkpoints(), st.integers(1, 700))
def test_every_byte_of_every_tensor_is_read_once_to_its_place(files, chunk_bytes):
    manifest = paper_manifest(files)
    expected = {(tensor.file, tensor.offset + i): tensor.place + i for tensor in manifest.tensors for i in range(tensor.nbytes)}
    read: dict[tuple[int, int], int] = {}
    for one in plan_reads(manifest, chunk_bytes):
        at = one.offset
        for place, nbytes in one.pieces:
            for i in range(nbytes):
                assert (one.file, at) not in read, "read twice"
                read[one.file, at] = place + i
                at += 1
    assert read == expected


@settings(max_examples=300, deadline=None)
@given(checkpoints(), st.integers(1, 700))
def test_reads_keep_to_their_limits_and_to_file_order(files, chunk_bytes):
    reads = plan_reads(paper_manifest(files), chunk_bytes)
    for one in reads:
        assert 0 < sum(nbytes for _, nbytes in one.pieces) <= chunk_bytes
        assert all(nbytes > 0 for _, nbytes in one.pieces)
    assert [(r.file, r.offset) for r in reads] == sorted((r.file, r.offset) for r in reads)


def test_a_read_scatters_to_no_more_pieces_than_the_system_takes():
    reads = plan_reads(paper_manifest([[(i, 1) for i in range(PIECES_PER_READ * 2 + 3)]]))
    assert [len(one.pieces) for one in reads] == [PIECES_PER_READ, PIECES_PER_READ, 3]


def test_neighbours_share_a_read_and_a_gap_ends_it():
    manifest = paper_manifest([[(0, 10), (10, 5), (20, 5)], [(0, 5)]])
    place = {tensor.name: tensor.place for tensor in manifest.tensors}
    assert plan_reads(manifest) == [
        Read(0, 0, ((place["0.0"], 10), (place["0.1"], 5))),
        Read(0, 20, ((place["0.2"], 5),)),
        Read(1, 0, ((place["1.0"], 5),)),
    ]


def test_a_large_tensor_is_read_in_chunks():
    assert [(r.offset, r.pieces) for r in plan_reads(paper_manifest([[(100, 25)]]), 10)] == [
        (100, ((0, 10),)), (110, ((10, 10),)), (120, ((20, 5),)),
    ]  # fmt: skip


def test_two_tensors_over_the_same_bytes_are_both_read():
    reads = plan_reads(paper_manifest([[(0, 10), (0, 10)]]))
    assert sorted(place for one in reads for place, _ in one.pieces) == [0, 512]


def test_nothing_to_read_needs_no_read():
    assert plan_reads(paper_manifest([[]])) == []
    assert plan_reads(paper_manifest([[(0, 0), (5, 0)]])) == []


# Real files


def write(path: Path, nbytes: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(nbytes))
    return path


class Attempt:
    """A staging of real files into real memory; :meth:`run` proves that nothing is left of it."""

    def __init__(self, manifest: Manifest, flags: int = os.O_RDONLY, paths: list[str] | None = None) -> None:
        self.manifest = manifest
        self.staging = Staging(manifest, [os.open(path, flags) for path in paths or [m.path for m in manifest.members]])
        self.result = b""

    def run(self, threads: int = 2) -> None:
        files = self.staging.files
        assert files
        area = mmap.mmap(-1, self.manifest.extent_bytes)
        view = memoryview(area)
        try:
            self.staging.run(view, threads)
        finally:
            self.result = bytes(area)
            view.release()
            area.close()  # BufferError if a slice of it were left
            assert self.staging.files == ()
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
    with pytest.raises(CheckpointChanged, match=re.escape(f"{path}: ends at byte 1000, but had 1000 bytes")):
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
    staging = Staging(manifest, [os.open(path, os.O_WRONLY if path is paths[1] else os.O_RDONLY) for path in paths])
    area = mmap.mmap(-1, manifest.extent_bytes)
    with pytest.raises(CheckpointUnreadable, match=re.escape(str(paths[1]))), memoryview(area) as view:
        staging.run(view, 2)
    area.close()
    assert staging.files == ()


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


def test_closing_the_files_twice_closes_them_once(tmp_path):
    path = write(tmp_path / "a", 10)
    staging = Staging(manifest_of([(path, [(0, 10)])]), [os.open(path, os.O_RDONLY)])
    (fd,) = staging.files
    staging.close_files()
    reused = os.open(path, os.O_RDONLY)
    assert reused == fd
    staging.close_files()
    assert os.fstat(reused)
    os.close(reused)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(checkpoints())
def test_any_layout_of_tensors_is_staged_whole(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("any")
    paths = [write(folder / str(i), 9000, i) for i in range(len(files))]
    manifest = manifest_of(list(zip(paths, files, strict=True)))
    attempt = Attempt(manifest)
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
            staging = Staging(manifest, [os.open(path, os.O_RDONLY)])

            def fill(fails: bool = fails) -> None:
                if fails:
                    raise RuntimeError("before it even began")

            error = in_background(background, staging, fill)
            assert isinstance(error, RuntimeError) is fails
            assert staging.files == ()
    finally:
        background.close()


def test_closing_the_reader_cancels_what_runs(tmp_path):
    path = write(tmp_path / "a", 10)
    staging = Staging(manifest_of([(path, [(0, 10)])]), [os.open(path, os.O_RDONLY)])
    background = Reader(threads=1)
    running, told = threading.Event(), []

    def fill() -> None:
        running.set()
        assert staging._cancelled.wait(10)
        with memoryview(bytearray(1000)) as view:
            staging.run(view, 1)

    background.start(staging, fill, told.append)
    assert running.wait(10)
    background.close()
    assert [type(error) for error in told] == [CheckpointUnreadable]


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
