"""Every format through the cache, beside its stock reader: in this process and another, on the CPU and an emulated GPU."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import nbcache
from nbcache import errors
from nbcache.checkpoints import catalog
from nbcache.models.gguf import gguf_parameters
from nbcache.models.packages import release
from tests.support.contents import assert_alike, shared
from tests.support.gguf import write_gguf, write_quantized_state
from tests.support.kernels import Interpreter, Kernel

ROOT = Path(__file__).resolve().parents[2]


def write_pickled(path: Path, seed: int = 0) -> Path:
    """A checkpoint with what safetensors cannot say: tied and turned tensors, a view, numbers beside them."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(300, 200, generator=generator)
    tied = torch.randn(64, 64, generator=generator)
    state = {
        "embed": tied,
        "head": tied,
        "turned": whole.t(),
        "part": whole[10:20],
        "alone": torch.arange(5),
        "empty": torch.zeros(3, 0),
    }
    torch.save({"model": state, "half": torch.randn(3, 5, generator=generator).half(), "epoch": 3}, path)
    return path


def write_arrays(path: Path) -> Path:
    random = np.random.default_rng(0)
    np.savez(path, a=random.standard_normal((30, 20)), b=np.asfortranarray(random.standard_normal((4, 5))), c=np.arange(3))
    return path


def stock_pickled(path: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, weights_only=True)
    return {f"model.{name}": tensor for name, tensor in loaded["model"].items()} | {"half": loaded["half"]}


def stock_arrays(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(path).items()}


def stock_gguf(path: Path) -> dict[str, torch.Tensor]:
    """As the reader gives them; bfloat16, which NumPy lacks, as what it is."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(np.array(tensor.data))
        found[tensor.name] = values.view(torch.bfloat16) if tensor.tensor_type is Kind.BF16 else values
    return found


FORMATS = {
    "pt": (write_pickled, "model.pt", stock_pickled),
    "npz": (write_arrays, "a.npz", stock_arrays),
    "gguf": (write_gguf, "model.gguf", stock_gguf),
}


@pytest.fixture(params=FORMATS)
def made(request, runtime_dir, tmp_path):
    write, name, stock = FORMATS[request.param]
    path = write(tmp_path / name)
    return path, stock


def load(path: object, **options: object) -> nbcache.Weights:
    return nbcache.load(str(path), **({"device": "cpu"} | options))


def assert_same(weights: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    assert list(weights) == list(stock)
    for name, tensor in stock.items():
        assert_alike(weights[name], tensor, name)
    assert shared(weights) == shared(stock)


# On the CPU


@pytest.mark.parametrize("share", ["cow", "readonly", "private"])
def test_a_load_and_a_hit_equal_a_stock_load(made, share):
    path, stock = made
    first = load(path, share=share)
    second = load(path, share=share)
    assert (first.hit, second.hit) == (False, True)
    for weights in (first, second):
        assert_same(dict(weights), stock(path))
    (entry,) = nbcache.status().entries
    assert entry.tensors == len(first)
    assert entry.bytes == first.nbytes


def test_another_process_gets_the_same(made):
    path, stock = made
    weights = load(path)
    with Interpreter("nbcache", "torch") as other:
        other.run(f"w = nbcache.load({str(path)!r}, device='cpu')")
        assert other.run("w.hit") is True
        digest = (
            "[[n, str(t.dtype), list(t.shape), list(t.stride()), t.double().nan_to_num().sum().item()] for n, t in {}.items()]"
        )
        assert other.run(digest.format("w")) == eval(digest.format("weights"))
    assert_same(dict(weights), stock(path))


def test_weights_pickle_by_reference_with_their_views(made):
    path, stock = made
    assert_same(dict(pickle.loads(pickle.dumps(load(path)))), stock(path))


def test_a_hit_opens_nothing_and_reads_nothing(made, monkeypatch):
    path, _ = made
    load(path).release()

    def refuse(*_: object) -> None:
        raise AssertionError("a hit must not describe, resolve or open")

    for name in ("describe", "resolve"):
        monkeypatch.setattr(f"nbcache.client.fill.{name}", refuse)
    monkeypatch.setattr(catalog, "_open", refuse)
    assert load(path).hit


def test_a_changed_file_is_read_again(made):
    path, _ = made
    load(path).release()
    os.utime(path, ns=(1, 1))
    assert not load(path).hit


def test_what_shares_memory_shares_writes_and_others_do_not_see_them(runtime_dir, tmp_path):
    path = write_pickled(tmp_path / "model.pt")
    weights = load(path)
    weights["model.part"][0, 0] = 42
    assert weights["model.turned"][0, 10] == 42
    weights["model.embed"].zero_()
    assert not weights["model.head"].any()
    assert_same(dict(load(path)), stock_pickled(path))
    private = load(path, share="private")
    private["model.head"].zero_()
    assert not private["model.embed"].any()
    assert private.private_bytes == private.nbytes == weights.nbytes


def test_a_cast_keeps_strides_and_sharing(runtime_dir, tmp_path):
    path = write_pickled(tmp_path / "model.pt")
    weights = load(path, dtype="bfloat16")
    stock = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in stock_pickled(path).items()}
    for name, tensor in stock.items():
        assert_alike(weights[name], tensor, name)
    assert shared(dict(weights)) == shared(stock_pickled(path))
    assert weights.nbytes == (300 * 200 + 64 * 64 + 15) * 2 + 5 * 8


def test_what_is_beside_the_tensors_is_metadata(runtime_dir, tmp_path):
    assert load(write_pickled(tmp_path / "model.pt")).metadata == {"epoch": "3"}


def test_weights_of_any_strides_can_be_put(runtime_dir, tmp_path):
    torch.save({"a": torch.ones(1).as_strided((1,), (0,)), "b": torch.randn(3, 4).t()}, tmp_path / "a.pt")
    weights = load(tmp_path / "a.pt")
    kept = nbcache.put("kept", weights)
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


def test_a_module_loads_it_as_it_loads_the_stock_one(runtime_dir, tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = torch.nn.Embedding(10, 4), torch.nn.BatchNorm1d(4)
            self.head = torch.nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.embed(tokens)))

    model, again = Tied().eval(), Tied().eval()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    weights = load(tmp_path)
    again.load_state_dict(weights, assign=True)
    again.head.weight = again.embed.weight
    assert torch.equal(again(torch.arange(10)), model(torch.arange(10)))


# Folders and shards


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    shards = [{"a": torch.randn(4, 3).t(), "b": torch.randn(2)}, {"c": torch.randn(3)}]
    names = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
    for name, tensors in zip(names, shards, strict=True):
        torch.save(tensors, folder / name)
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards[0] | shards[1]


def test_shards_with_an_index(runtime_dir, tmp_path):
    stock = write_shards(tmp_path)
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    assert_same(dict(load(tmp_path)), stock)
    weights = load(tmp_path / "pytorch_model.bin.index.json")
    assert weights.hit
    assert_same(dict(weights), stock)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    nbcache.evict_all()
    weights.release()


@pytest.mark.parametrize("loss", ["shard", "tensor"])
def test_shards_that_lack_something_are_incomplete(runtime_dir, tmp_path, loss):
    write_shards(tmp_path)
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    if loss == "shard":
        shard.unlink()
    else:
        torch.save({"other": torch.zeros(1)}, shard)
    with pytest.raises(errors.CheckpointIncomplete, match=r"pytorch_model-00002-of-00002\.bin"):
        load(tmp_path)


def test_a_folder_prefers_safetensors_then_torch_then_gguf(runtime_dir, tmp_path):
    from safetensors.torch import save_file

    write_gguf(tmp_path / "model-Q4_K.gguf", (Kind.Q4_0,))
    assert list(load(tmp_path)) == ["Q4_0"]
    torch.save({"torch": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 0.1}, tmp_path / "optimizer.bin")
    assert list(load(tmp_path)) == ["torch"]
    save_file({"safe": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(load(tmp_path)) == ["safe"]


# GGUF in other forms


def test_quant_types_and_dequantized_values_are_those_of_the_package(runtime_dir, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tuple(kind for kind in Kind if computes(kind)))
    weights = load(path)
    plain = weights.dequantize()
    half = weights.dequantize("float16")
    for tensor in gguf.GGUFReader(path).tensors:
        name, kind = tensor.name, tensor.tensor_type
        assert weights.quant_types.get(name, kind.name) == kind.name
        if name in weights.quant_types:
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, kind)).reshape(3, 512)
            assert_alike(plain[name], expected, name)
            assert_alike(half[name], expected.half(), name)
        else:
            assert plain[name] is weights[name]
    assert len(weights.quant_types) > 15
    weights.release()
    with pytest.raises(errors.WeightsReleased):
        weights.dequantize()


def computes(kind: Kind) -> bool:
    """Whether the package computes this type."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return per_block > 1 or kind in (Kind.F32, Kind.F16)


def test_a_type_that_the_package_does_not_compute_is_named(runtime_dir, tmp_path):
    missing = next(kind for kind in Kind if gguf.GGML_QUANT_SIZES[kind][0] > 1 and not computes(kind))
    with pytest.raises(errors.UnsupportedFormat, match=rf"tensor .{missing.name}.: .*does not compute {missing.name}"):
        load(write_gguf(tmp_path / "model.gguf", (missing,))).dequantize()


def test_without_the_package_the_error_names_it(runtime_dir, tmp_path, monkeypatch):
    import diffusers.quantizers.gguf.utils  # noqa: F401 - it looks for gguf once, when it is imported

    weights = load(write_gguf(tmp_path / "model.gguf", (Kind.Q4_0,)))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(errors.PackageMissing, match=r"pip install 'nbcache\[gguf\]'"):
        weights.dequantize()
    with pytest.raises(errors.PackageMissing, match="pip install diffusers gguf"):
        gguf_parameters(weights)


def test_diffusers_gets_its_own_parameters_over_the_same_memory(runtime_dir, tmp_path):
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter, dequantize_gguf_tensor

    path = write_gguf(tmp_path / "model.gguf", (*SUPPORTED_GGUF_QUANT_TYPES, Kind.F32, Kind.F16))
    weights = load(path)
    stock, ours = load_gguf_checkpoint(path), gguf_parameters(weights)
    assert list(ours) == list(stock)
    for name, expected in stock.items():
        found = ours[name]
        assert type(found) is type(expected)
        assert (found.dtype, found.shape, found.requires_grad) == (expected.dtype, expected.shape, expected.requires_grad)
        assert found.data_ptr() == weights[name].data_ptr()
        if isinstance(expected, GGUFParameter):
            assert (found.quant_type, found.quant_shape) == (expected.quant_type, expected.quant_shape)
            assert_alike(dequantize_gguf_tensor(found), dequantize_gguf_tensor(expected), name)
        else:
            assert_alike(found, expected, name)


TINY = {
    "patch_size": 2, "in_channels": 32, "out_channels": 8, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def write_quantized_model(folder: Path) -> Path:
    """A tiny transformer of diffusers as a config and a GGUF file, its linear layers in Q8_0."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**TINY)
    model.save_config(folder)
    return write_quantized_state(folder / "model.gguf", model)


def test_a_model_of_diffusers_runs_on_them_uncopied_and_as_the_stock_one(runtime_dir, tmp_path):
    from diffusers import GGUFQuantizationConfig, QwenImageTransformer2DModel

    path = write_quantized_model(tmp_path)
    weights = load(path)

    def build(source: object) -> torch.nn.Module:
        config = GGUFQuantizationConfig(compute_dtype=torch.float32)
        options = {"quantization_config": config, "config": str(tmp_path), "torch_dtype": torch.float32}
        return QwenImageTransformer2DModel.from_single_file(source, **options)

    @torch.no_grad()
    def run(model: torch.nn.Module) -> torch.Tensor:
        image, text = torch.ones(1, 16, 32), torch.ones(1, 3, 32)
        mask, steps = torch.ones(1, 3, dtype=torch.long), torch.tensor([1.0])
        inputs = {"encoder_hidden_states_mask": mask, "timestep": steps, "img_shapes": [[(1, 4, 4)]]}
        if release(metadata.version("diffusers")) < (0, 36):
            inputs["txt_seq_lens"] = [3]
        return model(image, text, **inputs).sample

    stock, ours = build(str(path)), build(gguf_parameters(weights))
    assert all(parameter.data_ptr() == weights[name].data_ptr() for name, parameter in ours.named_parameters())
    assert {name for name, parameter in ours.named_parameters() if hasattr(parameter, "quant_type")} == set(weights.quant_types)
    assert torch.equal(run(ours), run(stock))


def test_a_type_that_diffusers_does_not_compute_is_named(runtime_dir, tmp_path):
    with pytest.raises(errors.UnsupportedFormat, match="'IQ1_S' is IQ1_S, which diffusers does not compute"):
        gguf_parameters(load(write_gguf(tmp_path / "model.gguf", (Kind.IQ1_S,))))


def test_files_of_other_formats_have_no_quant_types(runtime_dir, tmp_path):
    weights = load(write_pickled(tmp_path / "model.pt"))
    assert weights.quant_types == {}
    assert list(weights.dequantize()) == list(weights)


# On an emulated GPU

GPU = """
import torch, nbcache, numpy as np
from tests.parity.test_formats import FORMATS, assert_same, assert_alike
"""


@pytest.fixture
def emulated(runtime_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NBCACHE_TEST_DRIVER", "tests.support.emulated:make")
    monkeypatch.setenv("NBCACHE_GPU_LOW_WATERMARK", "0")


def test_every_format_over_the_emulated_gpu(emulated, tmp_path):
    """First load, hit, cast and hit after the slab went: each share mode, in a process that has the emulated driver."""
    with Interpreter() as kernel:
        kernel.run(GPU)
        for write, name, _ in FORMATS.values():
            write(tmp_path / name)
            kernel.run(
                f"path = {str(tmp_path / name)!r}; stock = FORMATS[{name.rpartition('.')[2]!r}][2](path)\n"
                "for share in ('readonly', 'private', 'cow', 'readonly'):\n"
                "    w = nbcache.load(path, device='cuda', share=share)\n"
                "    assert_same(dict(w), stock)\n"
                "assert w.hit\n"
                "c = nbcache.load(path, device='cuda', dtype='bfloat16', share='readonly')\n"
                "for n, t in stock.items():\n"
                "    assert_alike(c[n], t.to(torch.bfloat16) if t.is_floating_point() else t, n)\n"
            )
        assert [slab.state for entry in nbcache.status().entries for slab in entry.devices].count("resident") >= len(FORMATS)


# From the command line and a notebook


def test_the_command_line_stages_every_format_without_torch(made):
    path, _ = made
    command = [sys.executable, "-m", "nbcache", "load", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    document = json.loads(done.stdout)
    assert document["hit"] is False
    weights = load(path)
    assert weights.hit
    assert (document["tensors"], document["bytes"]) == (len(weights), weights.nbytes)


def test_the_command_line_says_in_one_line_why_a_file_is_refused(runtime_dir, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    command = [sys.executable, "-m", "nbcache", "load", str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs 'torch.nn.modules.linear.Linear', code that nbcache does not run" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_magic_loads_every_format_before_and_after_a_restart(runtime_dir, tmp_path):
    with Kernel() as kernel:
        for hit in (False, True):
            kernel.run("%load_ext nbcache")
            for name, (write, file, _) in FORMATS.items():
                path = tmp_path / file
                if not hit:
                    write(path)
                line = kernel.run(f"%load_weights {path} --device cpu --as w")
                assert line.endswith("(cached, 0 B private)" if hit else "(read from disk)"), (name, line)
            kernel.restart()


# While it is read


@pytest.mark.parametrize("name", ["model.pt", "model.gguf", "a.npz"])
def test_a_file_that_is_cut_after_it_was_described_is_not_cached(runtime_dir, tmp_path, monkeypatch, name):
    write, _, stock = FORMATS[name.rpartition(".")[2]]
    path = write(tmp_path / name)
    whole = path.read_bytes()

    def describe_and_cut(checkpoint: catalog.Checkpoint) -> catalog.Description:
        description = catalog.describe(checkpoint)
        os.truncate(path, len(whole) // 2)
        return description

    with monkeypatch.context() as patched:
        patched.setattr("nbcache.client.fill.describe", describe_and_cut)
        with pytest.raises(errors.CheckpointChanged, match=r"changed while it was read|truncated"):
            load(path)
    assert not nbcache.status().entries
    path.write_bytes(whole)
    assert_same(dict(load(path)), stock(path))


def test_a_pickle_that_is_cut_while_it_is_described_is_invalid(runtime_dir, tmp_path, monkeypatch):
    path = write_pickled(tmp_path / "model.pt")
    opened = catalog._open

    def open_and_cut(*arguments: object) -> int:
        fd = opened(*arguments)
        os.truncate(path, 100)
        return fd

    monkeypatch.setattr(catalog, "_open", open_and_cut)
    with pytest.raises((errors.CheckpointInvalid, errors.CheckpointChanged), match=r"model\.pt"):
        load(path)
