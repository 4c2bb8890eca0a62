"""The status as text: a bar for each tier, in proportion."""

from __future__ import annotations

import pytest

from nbcache.jupyter.display import BAR_CELLS, cells, render_status, short_name
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
