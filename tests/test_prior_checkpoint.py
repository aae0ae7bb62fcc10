"""IP-Prior files: the released form, the safetensors form, and everything that is neither."""

import json
import logging
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pit_core.errors import PitError
from pit_core.files import hash_tensors, load_tensors
from pit_core.ip_prior.checkpoint import convert_prior, load_prior, recorded_max_crops, save_prior
from pit_core.ip_prior.info import PriorInfo
from pit_core.ip_prior.model import IPPrior

CFG = """\
output_dir: characters/model
hidden_dim: 32
num_layers: 2
num_attention_heads: 4
use_ref: true
max_crops: 7
sketch_prob: 0.5
lr: 1.0e-05
"""


def make_prior(**changes):
    torch.manual_seed(0)
    return IPPrior(**{"embedding_dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, **changes})


@pytest.fixture
def prior():
    return make_prior()


@pytest.fixture
def released(tmp_path, prior):
    """A folder as published: prior.ckpt and cfg.yaml."""
    folder = tmp_path / "characters_ckpt"
    folder.mkdir()
    torch.save(prior.state_dict(), folder / "prior.ckpt")
    (folder / "cfg.yaml").write_text(CFG)
    return folder


def same_weights(a, b):
    state = b.state_dict()
    return all(torch.equal(t, state[k]) for k, t in a.state_dict().items()) and len(state) == len(
        a.state_dict()
    )


def velocity(prior):
    generator = torch.Generator().manual_seed(1)
    x, cond = torch.randn(1, 16, 24, generator=generator), torch.randn(1, 48, 24, generator=generator)
    with torch.no_grad():
        return prior(x, torch.tensor([0.5]), cond)


def test_the_released_form_is_read_from_its_folder_or_file(released, prior):
    for path in (released, released / "prior.ckpt", str(released / "prior.ckpt")):
        loaded, info = load_prior(path)
        assert same_weights(prior, loaded) and not loaded.training
        assert torch.equal(velocity(loaded), velocity(prior))
        assert (info.use_ref, info.max_crops, info.sketch_prob) == (True, 7, 0.5)
        assert (info.embedding_dim, info.config.hidden_dim, info.config.n_heads) == (24, 32, 4)
        assert info.notes == ()


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"model": s, "step": 7, "lr": 0.1}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_state_dicts_and_prefixes_are_unwrapped(released, prior, wrap, prefix):
    state = {prefix + key: tensor for key, tensor in prior.state_dict().items()}
    torch.save({**wrap(state), "optimizer": {"state": [torch.zeros(3)]}}, released / "prior.ckpt")
    loaded, info = load_prior(released)
    assert same_weights(prior, loaded)
    assert info.content_hash == hash_tensors(prior.state_dict())


def test_save_and_load_keep_every_bit_and_every_setting(tmp_path, prior):
    info = PriorInfo(prior.config, use_ref=True, max_crops=5, sketch_prob=0.25)
    saved = save_prior(tmp_path / "deep" / "p.safetensors", prior, info, {"seed": 7})
    loaded, read = load_prior(tmp_path / "deep" / "p.safetensors")
    assert same_weights(prior, loaded)
    assert read == saved == replace(info, content_hash=hash_tensors(prior.state_dict()))
    metadata = load_tensors(tmp_path / "deep" / "p.safetensors")[1]
    assert (metadata["kind"], metadata["version"], metadata["seed"]) == ("ip_prior", "1", "7")
    assert json.loads(metadata["pit_config"])["num_attention_heads"] == 4
    assert os.listdir(tmp_path / "deep") == ["p.safetensors"]


def test_a_converted_prior_needs_no_cfg_and_keeps_its_hash(released, tmp_path, prior):
    report = convert_prior(released, tmp_path / "p.safetensors")
    assert (report.tensors, report.dtype) == (len(prior.state_dict()), torch.float32)
    assert report.bytes == (tmp_path / "p.safetensors").stat().st_size
    assert str(report).startswith("prior.ckpt -> ") and "float32" in str(report)
    loaded, info = load_prior(tmp_path / "p.safetensors")
    _, original = load_prior(released)
    assert same_weights(prior, loaded)
    assert info == original == report.info


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converting_to_half_is_half_the_file_and_loads_as_half(released, tmp_path, prior, dtype):
    convert_prior(released, tmp_path / "full.safetensors")
    report = convert_prior(released, tmp_path / "half.safetensors", dtype)
    assert report.bytes < 0.6 * (tmp_path / "full.safetensors").stat().st_size
    assert {t.dtype for t in load_tensors(tmp_path / "half.safetensors")[0].values()} == {dtype}
    half, info = load_prior(tmp_path / "half.safetensors")
    assert next(half.parameters()).dtype == dtype
    assert info.content_hash == report.info.content_hash == hash_tensors(half.state_dict())
    back, _ = load_prior(tmp_path / "half.safetensors", dtype=torch.float32)
    assert (velocity(back) - velocity(prior)).norm() < 0.03 * velocity(prior).norm()


def test_weights_that_a_dtype_cannot_hold_are_not_converted(tmp_path, prior):
    with torch.no_grad():
        prior.x_embedder.weight[0, 0] = 1e6
    save_prior(tmp_path / "p.safetensors", prior, PriorInfo(prior.config))
    with pytest.raises(PitError, match="too large for float16; use bfloat16"):
        convert_prior(tmp_path / "p.safetensors", tmp_path / "half.safetensors", torch.float16)
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_the_hash_tells_names_values_shapes_and_dtypes_apart():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "c": torch.ones(4)},
        {"a": torch.zeros(2, 3), "b": torch.ones(4).half()},
        {"a": torch.zeros(2, 3), "b": torch.full((4,), 2.0)},
    ]
    assert len({hash_tensors(t) for t in [base, *others]}) == 5
    assert hash_tensors(base) == hash_tensors({"b": base["b"], "a": base["a"].t().contiguous().t()})


def test_operations_and_dtype_reach_every_layer(released):
    class Own:
        class Linear(nn.Linear):
            pass

        class LayerNorm(nn.LayerNorm):
            pass

    loaded, _ = load_prior(released, operations=Own, dtype=torch.bfloat16)
    leaves = [m for m in loaded.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    assert all(type(m) in (Own.Linear, Own.LayerNorm) for m in leaves)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {str(p.device) for p in loaded.parameters()} == {"cpu"}


def test_without_a_cfg_the_heads_are_hidden_over_64_with_a_warning(tmp_path, caplog):
    prior = make_prior(hidden_dim=128, n_heads=2)
    torch.save(prior.state_dict(), tmp_path / "prior.ckpt")
    with caplog.at_level(logging.WARNING):
        loaded, info = load_prior(tmp_path / "prior.ckpt")
    assert info.config.n_heads == 2 and same_weights(prior, loaded)
    assert "2 (hidden_dim / 64) is assumed" in caplog.text
    assert len(info.notes) == 2 and "slot 0" in info.notes[1]


def test_a_yaml_of_the_files_own_name_goes_before_cfg_yaml(released):
    os.rename(released / "prior.ckpt", released / "toys.ckpt")
    (released / "toys.yaml").write_text(CFG.replace("max_crops: 7", "max_crops: 4"))
    assert load_prior(released / "toys.ckpt")[1].max_crops == 4


def test_the_number_of_parts_is_known_without_the_weights(released, tmp_path, prior):
    convert_prior(released, tmp_path / "new.safetensors")
    (released / "prior.ckpt").write_bytes(b"not read")
    assert [recorded_max_crops(path) for path in (released, released / "prior.ckpt")] == [7, 7]
    assert recorded_max_crops(tmp_path / "new.safetensors") == 7


@pytest.mark.parametrize("text", ["max_crops: many", "max_crops: true", "max_crops: 0", "lr: 1", "- 1", "{"])
def test_the_default_number_of_parts_stands_in_for_what_the_loader_refuses(released, text):
    (released / "cfg.yaml").write_text(text)
    assert recorded_max_crops(released) == PriorInfo.max_crops
    assert recorded_max_crops(released / "none.safetensors") == PriorInfo.max_crops


def test_an_explicit_config_goes_first(released, tmp_path):
    assert load_prior(released, config={"max_crops": 2})[1].max_crops == 2
    (tmp_path / "other.yaml").write_text("num_attention_heads: 8\n")
    info = load_prior(released, config=tmp_path / "other.yaml")[1]
    assert (info.config.n_heads, info.max_crops) == (8, 7)
    with pytest.raises(PitError, match="no file"):
        load_prior(released, config=tmp_path / "absent.yaml")


def test_python_tags_in_a_cfg_are_read_as_plain_values_and_never_run(released, tmp_path):
    canary = tmp_path / "canary"
    (released / "cfg.yaml").write_text(
        CFG
        + "paths: !!python/object/apply:pathlib.PosixPath [a, b]\n"
        + f"evil: !!python/object/apply:os.system ['touch {canary}']\n"
        + "shape: !!python/tuple [1, 2]\nmode: !!python/name:os.system ''\nown: !thing {a: 1}\n"
    )
    assert load_prior(released)[1].max_crops == 7
    assert not canary.exists()


def test_a_cfg_dumped_from_a_dataclass_is_read(released):
    (released / "cfg.yaml").write_text(
        "!!python/object:training.Config\n" + "".join(f"{line}\n" for line in CFG.splitlines())
    )
    assert load_prior(released)[1].max_crops == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", r"'cfg.yaml' should hold 'name: value' lines, got list"),
        ("", "got NoneType"),
        ("a: [1, 2\n", "'cfg.yaml' is not readable YAML"),
        ("a: !!bool maybe\n", "'cfg.yaml' is not readable YAML"),
        ("a: !!timestamp maybe\n", "'cfg.yaml' is not readable YAML"),
        ("a: 2001-13-45\n", "'cfg.yaml' is not readable YAML"),
        ("[" * 5000, "'cfg.yaml' is not readable YAML"),
        ("? [a]\n: b\n", "'cfg.yaml' is not readable YAML"),
        ("a: " + "x" * (1 << 20), "too large"),
        (CFG.replace("hidden_dim: 32", "hidden_dim: 64"), "say hidden_dim 64, but its weights have 32"),
        (CFG.replace("num_layers: 2", "num_layers: 3"), "say num_layers 3, but its weights have 2"),
        (CFG.replace("heads: 4", "heads: 5"), "hidden_dim 32 and n_heads 5"),
        (CFG.replace("heads: 4", "heads: many"), "n_heads .* got 'many'"),
        (CFG.replace("use_ref: true", "use_ref: 1"), "use_ref .* got 1"),
        (CFG.replace("max_crops: 7", "max_crops: 0"), "max_crops .* got 0"),
        (CFG.replace("sketch_prob: 0.5", "sketch_prob: .nan"), "sketch_prob .* got nan"),
    ],
)
def test_a_bad_cfg_is_one_sentence(released, text, message):
    (released / "cfg.yaml").write_text(text)
    with pytest.raises(PitError, match=message) as error:
        load_prior(released)
    assert "\n" not in str(error.value)


def test_a_cfg_that_is_not_text(released):
    (released / "cfg.yaml").write_bytes(b"\xff\xfe\x00\x01binary")
    with pytest.raises(PitError, match="'cfg.yaml' is not readable YAML"):
        load_prior(released)


FOREIGN = {
    "an IP-Adapter": ["image_proj.latents", "ip_adapter.1.to_k_ip.weight"],
    "a LoRA": ["unet.down_blocks.0.attn.to_q.lora_A.weight"],
    "a full Stable Diffusion checkpoint": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a UNet or VAE": ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
    "a diffusion transformer": ["transformer_blocks.0.attn.to_q.weight", "x_proj.weight"],
    "an image encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "a direction": ["tensor"],
    "an unknown kind of file": ["net.0.weight"],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_another_family_are_named(tmp_path, what):
    save_file({key: torch.ones(4, 4) for key in FOREIGN[what]}, tmp_path / "x.safetensors")
    with pytest.raises(PitError, match=rf"'x.safetensors' is {what}.*, not an IP-Prior"):
        load_prior(tmp_path / "x.safetensors")


def test_another_kind_in_the_metadata_is_named(tmp_path, prior):
    save_file(prior.state_dict(), tmp_path / "x.safetensors", metadata={"kind": "direction"})
    with pytest.raises(PitError, match="a file of kind 'direction', not an IP-Prior"):
        load_prior(tmp_path / "x.safetensors")


def change(state, key, tensor):
    state.pop(key) if tensor is None else state.__setitem__(key, tensor)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("layers.0.attention.wq.weight", None, "missing: layers.0.attention.wq.weight"),
        (
            "layers.0.attention.wq.weight",
            torch.zeros(32, 16),
            r"wq.weight is \(32, 16\) instead of \(32, 32\)",
        ),
        ("pos_embedding", torch.zeros(4), "unexpected: pos_embedding"),
        ("x_embedder.weight", torch.zeros(32), r"x_embedder.weight of shape \(32,\)"),
        ("final_layer.linear.bias", torch.full((24,), float("nan")), "NaN or infinite"),
        ("final_layer.linear.bias", torch.full((24,), float("inf")), "NaN or infinite"),
        (
            "final_layer.linear.bias",
            torch.zeros(24, dtype=torch.int8),
            "torch.int8 in final_layer.linear.bias",
        ),
        ("ema.x_embedder.weight", torch.zeros(32, 24), "several IP-Priors"),
    ],
)
def test_weights_that_are_not_quite_a_prior_are_named(released, prior, key, tensor, message):
    state = prior.state_dict()
    change(state, key, tensor)
    torch.save(state, released / "prior.ckpt")
    with pytest.raises(PitError, match=message) as error:
        load_prior(released)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_named(released, tmp_path):
    whole = (released / "prior.ckpt").read_bytes()
    convert_prior(released, tmp_path / "p.safetensors")
    tensors = (tmp_path / "p.safetensors").read_bytes()
    for part in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (released / "prior.ckpt").write_bytes(whole[:part])
        with pytest.raises(PitError, match=r"'prior.ckpt'"):
            load_prior(released)
    for part in (0, 7, 100, len(tensors) // 2, len(tensors) - 1):
        (tmp_path / "p.safetensors").write_bytes(tensors[:part])
        with pytest.raises(PitError, match=r"'p.safetensors'"):
            load_prior(tmp_path / "p.safetensors")


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_pickle_with_code_is_not_run(tmp_path, prior, writer):
    writer({"state_dict": prior.state_dict(), "config": Evil(tmp_path / "canary")}, tmp_path / "prior.ckpt")
    with pytest.raises(PitError, match="not opened|damaged"):
        load_prior(tmp_path / "prior.ckpt")
    assert not (tmp_path / "canary").exists()


def test_folders_without_one_clear_prior_are_named(tmp_path, prior):
    with pytest.raises(PitError, match="found none; name the file"):
        load_prior(tmp_path)
    info = PriorInfo(prior.config)
    save_prior(tmp_path / "a.safetensors", prior, info)
    assert load_prior(tmp_path)[1].config == prior.config
    save_prior(tmp_path / "b.safetensors", prior, info)
    with pytest.raises(PitError, match=r"found a.safetensors, b.safetensors; name the file"):
        load_prior(tmp_path)
    with pytest.raises(PitError, match="no file"):
        load_prior(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "ip_prior", "version": "2"}, "version 2, newer than"),
        ({"kind": "ip_prior", "version": "x"}, "version x"),
        ({"kind": "ip_prior", "pit_config": "{"}, "settings that are not JSON"),
        ({"kind": "ip_prior", "pit_config": "[1]"}, "settings that are no mapping"),
        ({"kind": "ip_prior", "pit_config": "[" * 100_000}, "settings that are not JSON"),
        ({"kind": "ip_prior", "pit_config": '{"embedding_dim": 768}'}, "embedding_dim 768, but .* 24"),
    ],
)
def test_bad_metadata_is_one_sentence(tmp_path, prior, metadata, message):
    save_file(prior.state_dict(), tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(PitError, match=message):
        load_prior(tmp_path / "p.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, prior):
    info = PriorInfo(prior.config)
    save_prior(tmp_path / "p.safetensors", prior, info)
    before = (tmp_path / "p.safetensors").read_bytes()
    with torch.no_grad():
        prior.x_embedder.weight[0, 0] = float("nan")
    with pytest.raises(PitError, match="The prior holds NaN"):
        save_prior(tmp_path / "p.safetensors", prior, info)
    with pytest.raises(PitError, match="its info describes"):
        save_prior(tmp_path / "p.safetensors", make_prior(n_heads=8), info)
    assert (tmp_path / "p.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_a_conversion_never_overwrites_its_source(released, tmp_path):
    convert_prior(released, tmp_path / "p.safetensors")
    before = (tmp_path / "p.safetensors").read_bytes()
    with pytest.raises(PitError, match="is the file being converted"):
        convert_prior(tmp_path / "p.safetensors", tmp_path / ".." / tmp_path.name / "p.safetensors")
    with pytest.raises(PitError, match=r"ends in .safetensors, got 'p.ckpt'"):
        convert_prior(tmp_path / "p.safetensors", tmp_path / "p.ckpt")
    assert (tmp_path / "p.safetensors").read_bytes() == before


def test_a_prior_without_query_and_key_norms_is_read_as_such(tmp_path):
    prior = make_prior(qk_norm=False)
    save_prior(tmp_path / "p.safetensors", prior, PriorInfo(prior.config))
    loaded, info = load_prior(tmp_path / "p.safetensors")
    assert not info.config.qk_norm and torch.equal(velocity(loaded), velocity(prior))


def test_loading_leaves_no_open_view_of_the_file(tmp_path, prior):
    path = tmp_path / "p.safetensors"
    save_prior(path, prior, PriorInfo(prior.config))
    loaded, _ = load_prior(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert same_weights(prior, loaded)
