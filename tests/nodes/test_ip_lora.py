"""A LoRA on model and adapter: what changes, by how much, what is said of it, and what it goes along with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Bench, RealBench, lora_tensors
from torch import Tensor

LAYOUTS = ["released", "b4m", "peft", "processor", "kohya"]


@pytest.fixture(scope="module")
def model(bench: Bench) -> Any:
    return bench.model()


@pytest.fixture(scope="module")
def adapter(bench: Bench) -> Any:
    return bench.adapter()


@pytest.fixture(scope="module")
def before(bench: Bench, model: Any) -> dict[str, Tensor]:
    return bench.loaded(model)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name, value in a.items() if not torch.equal(value, b[name])}


def keys_of(bench: Bench, model: Any) -> dict[str, str]:
    """Our names of the LoRA's layers -> the host's names of their weights."""
    names, keys = bench.part("pit_core.lora.keys"), bench.host.lora_keys(model)
    return {module: keys[names.kohya_name(module)] for module in bench.lora_shapes()}


# what changes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_becomes_w_plus_s_b_a(
    bench: Bench, model: Any, before: dict[str, Tensor], layout: str
) -> None:
    file = bench.lora_file(layout=layout)
    patched, _, report = bench.run("PiTIPLoRA", model=model, file=file, strength=0.7).args
    keys, factors = keys_of(bench, model), lora_tensors(bench.lora_shapes(), "bare")
    after = bench.loaded(patched)
    for module, key in keys.items():
        down, up = (factors[f"{module}.lora.{part}.weight"].double() for part in ("down", "up"))
        expected = before[key].double() + 0.7 * up @ down
        assert (after[key] - expected).abs().max() < 1e-6, module
    assert changed(before, after) == set(keys.values())
    assert f"model: {len(keys)} of {len(keys)} layers patched" in report and "warning" not in report
    assert changed(before, bench.loaded(model)) == set()


def test_blocks_have_strengths_of_their_own(bench: Bench, model: Any, before: dict[str, Tensor]) -> None:
    file = bench.lora_file()
    groups = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
    keys = keys_of(bench, model)
    for only, start in groups.items():
        strengths = {name: 2.0 if name == only else 0.0 for name in groups}
        patched = bench.first("PiTIPLoRA", model=model, file=file, strength=0.5, **strengths)
        after = bench.loaded(patched)
        wanted = {key for module, key in keys.items() if module.startswith(start)}
        assert wanted and changed(before, after) == wanted
        whole = bench.loaded(bench.first("PiTIPLoRA", model=model, file=file))
        assert all((after[key] - whole[key]).abs().max() < 1e-6 for key in wanted)
    off = bench.first("PiTIPLoRA", model=model, file=file, strength=0.0)
    assert changed(before, bench.loaded(off)) == set()


# the adapter's own layers


def through(bench: Bench, adapter: Any) -> dict[int, tuple[Tensor, Tensor]]:
    return adapter.keys_values("tokens", bench.tokens(1).tokens, torch.float32)


def test_the_adapters_layers_become_w_plus_s_b_a(bench: Bench, model: Any, adapter: Any) -> None:
    """Seen through what they are for: keys and values; the adapter given stays as it was."""
    file, plain = bench.lora_file(ip=True), through(bench, adapter)
    _, after, report = bench.run(
        "PiTIPLoRA", model=model, file=file, strength=0.5, adapter_layers=1.5, ip_adapter=adapter
    ).args
    tokens, shapes = bench.tokens(1).tokens, bench.lora_shapes(ip=True)
    factors = lora_tensors(shapes, "bare")
    found = through(bench, after)
    attentions = [module.removesuffix(".to_k_ip") for module in shapes if module.endswith(".to_k_ip")]
    assert len(found) == len(attentions)
    for n, attention in enumerate(attentions):  # both in the adapter's order
        for i, name in enumerate(("to_k_ip", "to_v_ip")):
            down, up = (factors[f"{attention}.{name}.lora.{part}.weight"] for part in ("down", "up"))
            expected = plain[n][i] + 0.75 * tokens @ down.T @ up.T
            assert close(found[n][i], expected) and not close(found[n][i], plain[n][i])
    adapter._kept.clear()
    again = through(bench, adapter)
    assert all(torch.equal(again[n][i], plain[n][i]) for n in plain for i in (0, 1))
    assert after.adapter.content_hash != adapter.adapter.content_hash
    assert f"ip_adapter: {2 * len(attentions)} of {2 * len(attentions)} layers patched" in report


def test_tokens_may_be_applied_before_or_after(bench: Bench, model: Any, adapter: Any) -> None:
    """Also through an adapter that the file changes: tokens that are on the model go through the new one."""
    file, tokens = bench.lora_file(ip=True), bench.tokens(1)
    mask = torch.zeros(1, 8, 8)
    mask[..., :5] = 1
    options = {"tokens": tokens, "mask": mask, "weight": 0.8, "end_at": 0.9}

    def applied(onto: Any, through: Any) -> Any:
        return bench.first("PiTApplyTokens", model=onto, ip_adapter=through, **options)

    def under(onto: Any, through: Any) -> Any:
        return bench.run("PiTIPLoRA", model=onto, file=file, ip_adapter=through)

    lora_first = under(model, adapter)
    one = bench.sample(applied(lora_first[0], lora_first[1]))
    tokens_first = applied(model, adapter)
    plain = bench.sample(tokens_first)
    other = bench.sample(under(tokens_first, adapter)[0])
    assert torch.equal(one, other) and not close(one, plain)
    assert not close(one, bench.sample(applied(lora_first[0], adapter)))  # the adapter as it was
    assert torch.equal(bench.sample(tokens_first), plain)


def test_tokens_of_another_adapter_are_left_alone(bench: Bench, model: Any, adapter: Any) -> None:
    other = bench.adapter(name="other.safetensors", salt="other")
    on = bench.first("PiTApplyTokens", model=model, ip_adapter=other, tokens=bench.tokens(2))
    under = bench.first(
        "PiTIPLoRA", model=on, file=bench.lora_file(ip=True), ip_adapter=adapter,
        input_blocks=0.0, middle_block=0.0, output_blocks=0.0,
    )  # fmt: skip
    assert torch.equal(bench.sample(under), bench.sample(on))


def test_without_an_adapter_its_layers_are_a_warning(
    bench: Bench, model: Any, before: dict[str, Tensor]
) -> None:
    patched, none, report = bench.run("PiTIPLoRA", model=model, file=bench.lora_file(ip=True)).args
    assert none is None
    assert changed(before, bench.loaded(patched)) == set(keys_of(bench, model).values())
    count = sum(name.endswith("_ip") for name in bench.lora_shapes(ip=True))
    assert f"{count} belong to an IP-Adapter, and none is connected" in report
    assert "to_k_ip" in report.splitlines()[-1]


def test_an_adapter_that_the_file_leaves_alone_is_handed_on(bench: Bench, model: Any, adapter: Any) -> None:
    assert bench.run("PiTIPLoRA", model=model, file=bench.lora_file(), ip_adapter=adapter)[1] is adapter
    off = {"file": bench.lora_file(ip=True), "ip_adapter": adapter, "adapter_layers": 0.0}
    assert bench.run("PiTIPLoRA", model=model, **off)[1] is adapter


# others


def test_loras_stack_in_any_order(bench: Bench, model: Any) -> None:
    files = [bench.lora_file(), bench.lora_file("second.safetensors", seed=9, layout="kohya")]

    def stack(*order: int) -> Tensor:
        patched = model
        for i in order:
            patched = bench.first("PiTIPLoRA", model=patched, file=files[i], strength=0.6)
        return bench.sample(patched)

    plain = bench.sample(model)
    both = stack(0, 1)
    assert close(both, stack(1, 0))
    assert not close(both, stack(0)) and not close(both, stack(1)) and not close(stack(0), plain)
    assert torch.equal(bench.sample(model), plain)


def test_beside_cores_own_loader(real: RealBench, model: Any, adapter: Any) -> None:
    """Core's loader before, after, or in place of ours, with tokens in between."""
    import core_models

    formats = real.part("pit_core.lora.formats")
    content = formats.to_kohya(lora_tensors(real.lora_shapes(), "released", seed=9))
    ours = {"file": real.lora_file()}

    def tokens(onto: Any) -> Any:
        return real.first("PiTApplyTokens", model=onto, ip_adapter=adapter, tokens=real.tokens(1))

    first = core_models.with_lora(tokens(real.first("PiTIPLoRA", model=model, **ours)), content)
    last = real.first("PiTIPLoRA", model=tokens(core_models.with_lora(model, content)), **ours)
    found = real.sample(first)
    assert close(real.sample(last), found)
    alone = real.sample(real.first("PiTIPLoRA", model=tokens(model), **ours))
    assert not close(found, alone)
    instead = formats.to_kohya(lora_tensors(real.lora_shapes(), "released"))
    assert torch.equal(real.sample(core_models.with_lora(tokens(model), instead)), alone)


# what has no place


def test_what_has_no_place_is_named(bench: Bench, model: Any, before: dict[str, Tensor]) -> None:
    more = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": (32, 32),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    }
    file = bench.lora_file(**more)
    patched, _, report = bench.run("PiTIPLoRA", model=model, file=file).args
    total = len(bench.lora_shapes())
    assert changed(before, bench.loaded(patched)) == set(keys_of(bench, model).values())
    last = report.splitlines()[-1]
    assert last.startswith(f"warning: 2 of {total + 2} layers of 'tiny.safetensors' are not applied (down_bl")
    assert "1 are not in this model" in last and "1 belong to a text encoder" in last
    assert f"model: {total} of {total + 2} layers patched" in report


def test_a_warning_is_logged(bench: Bench, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    for ip in (False, True):
        bench.run("PiTIPLoRA", model=model, file=bench.lora_file(ip=ip))
    (said,) = [record for record in caplog.records if record.name.endswith("ip_lora")]
    assert "are not applied" in said.getMessage() and "to_k_ip" in said.getMessage()


def save(bench: Bench, tensors: dict[str, Tensor], name: str = "odd.safetensors") -> str:
    bench.part("pit_core.files").save_tensors(bench.folder / "models/loras" / name, tensors, {})
    return name


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"up_blocks.7.attentions.0.to_q": (32, 32)},
            r"1 of them are not in the model \(up_blocks.7.*to_q\)",
        ),
        ({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip": (8, 8)}, "belong to an IP-Adapter"),
        (
            {"mid_block.attentions.0.transformer_blocks.0.attn2.to_q": (7, 5)},
            r"changes 'mid_block.*attn2.to_q' as a weight of shape \(7, 5\), but the model's is",
        ),
    ],
)
def test_nothing_that_fits_is_an_error(
    bench: Bench, model: Any, shapes: dict[str, tuple[int, int]], words: str
) -> None:
    file = save(bench, lora_tensors(shapes, "released"))
    with pytest.raises(bench.error, match=words):
        bench.run("PiTIPLoRA", model=model, file=file)


def test_an_adapter_of_another_size_is_an_error(bench: Bench, model: Any, adapter: Any) -> None:
    shapes = bench.lora_shapes(ip=True)
    shapes = {name: shape for name, shape in shapes.items() if "down_blocks.1" not in name}
    file = save(bench, lora_tensors(shapes, "released"))
    with pytest.raises(bench.error, match="of the IP-Adapter's own layers .* but 'tiny.safetensors' has"):
        bench.run("PiTIPLoRA", model=model, file=file, ip_adapter=adapter)


def test_mistakes_are_one_sentence(bench: Bench, model: Any, adapter: Any) -> None:
    (bench.folder / "models/loras/page.safetensors").write_text("<html>not found</html>", "utf-8")
    file = bench.lora_file()
    for inputs, words in [
        ({"file": "gone.safetensors"}, "There is no file 'gone.safetensors'"),
        ({"file": "../ipadapter/tiny.safetensors"}, "."),
        ({"file": "page.safetensors"}, "page.safetensors"),
        ({"file": save(bench, {"a": torch.ones(2)})}, "is not a LoRA"),
        ({"file": file, "strength": float("nan")}, "strengths to be finite numbers"),
        ({"file": file, "output_blocks": float("inf")}, "strengths to be finite numbers"),
        ({"file": file, "model": "a model"}, "model is str, no diffusion model"),
        ({"file": file, "ip_adapter": "an adapter"}, "ip_adapter is str; connect 'Load IP-Adapter"),
    ]:
        with pytest.raises(bench.error, match=words) as error:
            bench.run("PiTIPLoRA", **{"model": model, **inputs})
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_changed_file_is_read_again(bench: Bench) -> None:
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTIPLoRA"]
    states = {
        node.fingerprint_inputs(file=bench.lora_file(layout=layout), strength=1.0) for layout in LAYOUTS
    }
    assert len(states) > 1 and node.fingerprint_inputs(file="gone.safetensors") == "missing"


def test_the_miniatures_are_always_listed(bench: Bench, model: Any, shipped: Path) -> None:
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTIPLoRA"]
    file = bench.lora_file()
    names = node.define_schema().inputs[1].options
    assert names == ["miniature: scene", "miniature: sheet", file]
    with pytest.raises(bench.error, match="'miniature: sheet' is missing from this installation"):
        bench.run("PiTIPLoRA", model=model, file=names[1])
    shutil.copy(bench.folder / "models/loras" / file, shipped / "ip_lora_sheet.safetensors")
    patched, _, report = bench.run("PiTIPLoRA", model=model, file=names[1]).args
    assert report.startswith("'ip_lora_sheet.safetensors': ") and "warning" not in report
    own = bench.first("PiTIPLoRA", model=model, file=file)
    assert torch.equal(bench.sample(patched), bench.sample(own))
    assert node.fingerprint_inputs(file=names[1]) == ""


# SDXL at its own size


@pytest.fixture(scope="module")
def sdxl(bench: Bench) -> Any:
    """The host's model of SDXL, its keys and shapes without their numbers."""
    if not isinstance(bench, RealBench):
        pytest.skip("runs in ComfyUI itself")
    return bench.sdxl()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_560_layers_of_sdxl_are_patched(real: RealBench, sdxl: Any, layout: str) -> None:
    from lora_files import lora_file, sdxl_shapes

    file = save(real, lora_file(sdxl_shapes(), rank=1, layout=layout))
    patched, _, report = real.run("PiTIPLoRA", model=sdxl, file=file).args
    assert len(patched.patches) == 560 and sdxl.patches == {}
    assert all(key.startswith("diffusion_model.") for key in patched.patches)
    assert "model: 560 of 560 layers patched (input 192, middle 80, output 288)" in report
    assert report.startswith(f"'{file}': {'B4M' if layout == 'b4m' else 'IP-LoRA'}, rank 1 (560 layers)")


def test_cores_own_loader_takes_our_files_and_not_the_released_ones(real: RealBench, sdxl: Any) -> None:
    import comfy.sd
    from lora_files import lora_file, sdxl_shapes

    formats = real.part("pit_core.lora.formats")
    released = lora_file(sdxl_shapes(), rank=1)
    counts = [
        len(comfy.sd.load_lora_for_models(sdxl, None, dict(content), 1.0, 0.0)[0].patches)
        for content in (released, formats.to_kohya(released))
    ]
    assert counts == [0, 560]
