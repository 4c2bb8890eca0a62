"""The status as text: a bar for each tier, in proportion."""

from __future__ import annotations

import pytest
import torch

from nbcache.jupyter.display import BAR_CELLS, cells, idle_slab_bytes, render_status, short_name
from nbcache.jupyter.magics import _ran_out_of_gpu_memory
from nbcache.protocol import messages as m


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("embeddings", "embeddings"),
        ("/model.safetensors", "/model.safetensors"),
        ("/home/me/models/minilm/model.safetensors", "minilm/model.safetensors"),
        ("/hf/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0123abcd/vae", "FLUX.1-dev/vae"),
        ("/hf/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0123abcd", "black-forest-labs/FLUX.1-dev"),
        ("/hf/hub/models--gpt2/snapshots/0123abcd/model.safetensors", "gpt2/model.safetensors"),
        ("/hf/hub/models--gpt2/snapshots/0123abcd/", "gpt2"),
    ],
)
def test_a_name_is_short_and_says_what_it_is(name, short):
    assert short_name(name) == short


@pytest.mark.parametrize(
    ("part", "whole", "full"), [(0, 10, 0), (1, 10**9, 1), (5, 10, 12), (10, 10, 24), (11, 10, 24), (1, 0, 0)]
)
def test_a_bar(part, whole, full):
    assert cells(part, whole) == "█" * full + "░" * (BAR_CELLS - full)


def test_tiers_have_bars():
    slab = m.DeviceResidence("GPU-1", "", "resident", 0)
    entry = m.EntryStatus("a", (), "file", (), 10**9, 2, "staged", "pinned", (slab,), 0, False, 1.0, "k", ())
    gpus = (m.DeviceStatus("GPU-1", "H100", 20 * 10**9, 80 * 10**9), m.DeviceStatus("GPU-2", "old", 0))
    lines = render_status(m.Status("1", 1, 9, 1.0, m.HostStatus(5 * 10**9, 10**10), gpus, (entry,))).splitlines()
    assert lines[0] == f"host tier: 5.0 GB of 10.0 GB used {'█' * 12}{'░' * 12}; daemon 9"
    assert lines[1] == f"gpu 0: H100, 20.0 GB of weights {'█' * 6}{'░' * 18} of 80.0 GB"
    assert lines[2] == "gpu 1: old, 0 B of weights"
    assert len(lines) == 5


def test_idle_slabs_count_as_what_they_take_on_the_gpu():
    """A cast slab is not as large as its file."""
    slabs = (
        m.DeviceResidence("GPU-1", "", "resident", 0, 400),
        m.DeviceResidence("GPU-1", "F16", "resident", 0, 200),
        m.DeviceResidence("GPU-2", "", "resident", 1, 400),
        m.DeviceResidence("GPU-3", "", "filling", 0, 400),
    )
    entry = m.EntryStatus("a", (), "file", (), 380, 2, "staged", "pinned", slabs, 0, False, 1.0, "k", ())
    assert idle_slab_bytes(m.Status("1", 1, 9, 1.0, m.HostStatus(0, 1), (), (entry,))) == 600


def test_an_out_of_memory_of_torchs_is_seen_through_what_was_raised_from_it():
    def raised(error, cause=None):
        try:
            raise error from cause
        except Exception as caught:
            return caught

    full = torch.OutOfMemoryError("full")
    assert _ran_out_of_gpu_memory(full)
    assert _ran_out_of_gpu_memory(raised(RuntimeError("wrapped"), full))
    assert not _ran_out_of_gpu_memory(raised(RuntimeError("other"), ValueError()))
    assert not _ran_out_of_gpu_memory(None)
