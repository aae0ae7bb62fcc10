"""Content and style on a model: what each dial changes, how files are joined, what is said, what is saved."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Bench, RealBench, lora_tensors
from torch import Tensor

NONE = "(none: content_file is one entity)"
LAYOUTS = ["bare", "released", "b4m", "kohya"]
"""0, 1 and 2 prefixes `unet.`, and kohya's keys."""

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(bench: Bench) -> Any:
    return bench.model()


@pytest.fixture(scope="module")
def before(bench: Bench, model: Any) -> Tensors:
    return bench.loaded(model)


def halves(bench: Bench, seed: int, basis: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (down, up) of a trained file: A and C of `basis` in separate channels, the rest of `seed`."""
    shapes = bench.lora_shapes()
    frozen, own = (lora_tensors(shapes, "bare", salt) for salt in (100 + basis, seed))
    made = {}
    for module, (m, n) in shapes.items():
        down, up = (own[f"{module}.lora.{part}.weight"].clone() for part in ("down", "up"))
        up[: m // 2, :2] = frozen[f"{module}.lora.up.weight"][: m // 2, :2]
        down[2:, : n // 2] = frozen[f"{module}.lora.down.weight"][2:, : n // 2]
        up[: m // 2, 2:] = 0
        down[:2, : n // 2] = 0
        made[module] = (down, up)
    return made


def file(bench: Bench, name: str, factors: dict[str, tuple[Tensor, Tensor]], layout: str = "b4m") -> str:
    from lora_files import lora_key

    keys = {
        lora_key(module, part, layout): tensor
        for module, pair in factors.items()
        for part, tensor in zip(("down", "up"), pair, strict=True)
    }
    bench.part("pit_core.files").save_tensors(bench.folder / f"models/loras/{name}.safetensors", keys, {})
    return f"{name}.safetensors"


def pair_of_files(bench: Bench, layout: str = "b4m", basis: int = 0) -> dict[str, str]:
    """The inputs of 'Load B4M'; the frozen halves of the style file belong to `basis`."""
    content, style = halves(bench, 1), halves(bench, 2, basis)
    names = ("content", content), ("style", style)
    return {f"{n}_file": file(bench, n, factors, layout) for n, factors in names}


def load(bench: Bench, **options: Any) -> Any:
    return bench.first("PiTLoadB4M", **pair_of_files(bench, **options))


def weights(bench: Bench, model: Any, b4m: Any, **dials: Any) -> Tensors:
    return bench.loaded(bench.first("PiTApplyB4M", model=model, b4m=b4m, **dials))


def changed(a: Tensors, b: Tensors) -> set[str]:
    return {name for name, value in a.items() if not torch.equal(value, b[name])}


def keys_of(bench: Bench, model: Any) -> dict[str, str]:
    """Our names of the LoRA's layers -> the host's names of their weights."""
    names, keys = bench.part("pit_core.lora.keys"), bench.host.lora_keys(model)
    return {module: keys[names.kohya_name(module)] for module in bench.lora_shapes()}


def expected(down: Tensor, up: Tensor, gains: tuple[float, float, float, float]) -> Tensor:
    """dW with its quadrants times (ul, ur, dl, dr), in double precision."""
    m, n = len(up) // 2, down.shape[1] // 2
    whole = up.double() @ down.double()
    ul, ur, dl, dr = gains
    top = torch.cat([ul * whole[:m, :n], ur * whole[:m, n:]], 1)
    return torch.cat([top, torch.cat([dl * whole[m:, :n], dr * whole[m:, n:]], 1)])


def check(bench: Bench, model: Any, before: Tensors, after: Tensors, deltas: dict[str, Tensor]) -> None:
    keys = keys_of(bench, model)
    assert changed(before, after) == {keys[module] for module in deltas}
    for module, delta in deltas.items():
        found = after[keys[module]].double() - before[keys[module]].double()
        assert (found - delta).abs().max() < 2e-6, module


# what each dial changes


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dials", [(1, 1, 1), (0.7, -0.5, 2), (1, 0, 1), (0, 1, 0)])
def test_every_quadrant_has_its_dial(
    bench: Bench, model: Any, before: Tensors, dials: tuple[float, float, float], swap: bool
) -> None:
    content, style, base = dials
    after = weights(
        bench, model, load(bench), content=content, style=style, base=base, swap_roles=swap
    )  # fmt: skip
    lower, right = (content, style) if swap else (style, content)
    gains = (base, base * right, lower, lower * right)
    c, s = halves(bench, 1), halves(bench, 2)
    down, up = (s, c) if swap else (c, s)
    deltas = {module: expected(down[module][0], up[module][1], gains) for module in c if any(gains)}
    check(bench, model, before, after, deltas)
    assert changed(before, bench.loaded(model)) == set()


def test_dials_at_zero_leave_the_model_as_it_was(bench: Bench, model: Any, before: Tensors) -> None:
    b4m = load(bench)
    done = bench.run("PiTApplyB4M", model=model, b4m=b4m, content=0.0, style=0.0, base=0.0)
    assert changed(before, bench.loaded(done[0])) == set()
    assert "model: 0 of" in done[2]
    done = bench.run("PiTApplyB4M", model=model, b4m=b4m, content=2.0, style=0.0, base=0.0)
    assert changed(before, bench.loaded(done[0])) == set()
    assert "With base and style 0 the content has nothing to act through." in done[2]
    with pytest.raises(bench.error, match="b4m: There is nothing left of this B4M"):
        bench.run("PiTSaveB4M", b4m=done[1])


def test_prefixes_make_no_difference(bench: Bench, model: Any, before: Tensors) -> None:
    found = [weights(bench, model, load(bench, layout=layout), content=0.5) for layout in LAYOUTS]
    assert changed(before, found[0])
    assert all(changed(found[0], other) == set() for other in found[1:])


def test_one_entity_is_taken_apart_as_its_two_files_are_joined(
    bench: Bench, model: Any, before: Tensors
) -> None:
    c, s = halves(bench, 1), halves(bench, 2)
    joined = {module: (c[module][0], s[module][1]) for module in c}
    entity, report = bench.run("PiTLoadB4M", content_file=file(bench, "joined", joined)).args
    assert report.startswith("'joined.safetensors': B4M, rank 4")
    dials = {"content": 0.3, "style": 1.5, "base": 0.8}
    assert (
        changed(weights(bench, model, load(bench), **dials), weights(bench, model, entity, **dials)) == set()
    )


def test_a_slider_moves_without_the_files(bench: Bench, model: Any, before: Tensors) -> None:
    """They are read by the loader alone, whose inputs a slider does not touch."""
    b4m = load(bench)
    for name in ("content", "style"):
        (bench.folder / f"models/loras/{name}.safetensors").unlink()
    found = [weights(bench, model, b4m, content=content) for content in (0.5, 1.0)]
    assert changed(*found) and changed(before, found[0])
    names = [entry.id for entry in bench.pack.NODE_CLASS_MAPPINGS["PiTApplyB4M"].define_schema().inputs]
    assert not any("file" in name for name in names)


def test_blocks_have_weights_of_their_own(bench: Bench, model: Any, before: Tensors) -> None:
    b4m, keys = load(bench), keys_of(bench, model)
    c, s = halves(bench, 1), halves(bench, 2)
    deltas = {
        module: expected(c[module][0], s[module][1], (1, 1, 0, 0) if "ions.0." in module else (1, 0, 1, 0))
        for module in keys
        if module.startswith(("up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."))
    }
    text = "up_blocks.0.attentions.0: 1 0; up_blocks.0.attentions.1: 0 1; *: 0"
    for options in ({"blocks": "B-LoRA"}, {"blocks": "custom", "block_weights": text}):
        check(bench, model, before, weights(bench, model, b4m, **options), deltas)
    whole = weights(bench, model, b4m, block_weights=text)  # not asked for
    assert changed(before, whole) == set(keys.values())


# how files are joined


def test_other_bases_are_added_up_and_it_is_said(bench: Bench, model: Any, before: Tensors) -> None:
    b4m, report = bench.run("PiTLoadB4M", **pair_of_files(bench, basis=5)).args
    assert "not made for each other: Their frozen halves differ" in report
    done = bench.run("PiTApplyB4M", model=model, b4m=b4m, content=0.5, style=-1.0)
    assert "B4M does not apply, so the two LoRAs were added up." in done[2] and "added up, content" in done[2]
    c, s = halves(bench, 1), halves(bench, 2, 5)
    deltas = {m: 0.5 * c[m][1].double() @ c[m][0].double() - s[m][1].double() @ s[m][0].double() for m in c}
    check(bench, model, before, bench.loaded(done[0]), deltas)
    spliced = bench.run("PiTApplyB4M", model=model, b4m=b4m, mode="splice")
    assert "(splice)" in spliced[2] and "note: Their frozen halves differ" in spliced[2]


def test_ordinary_loras_are_added_up(bench: Bench, model: Any) -> None:
    plain = bench.lora_file(more=(8, 8))
    content = pair_of_files(bench)["content_file"]
    b4m = bench.first("PiTLoadB4M", content_file=content, style_file=plain)
    report = bench.run("PiTApplyB4M", model=model, b4m=b4m)[2]
    assert "B4M does not apply" in report and "1 are not in this model" in report
    told = bench.run("PiTLoadB4M", content_file=plain, style_file=NONE)[1]
    assert "warning: 'tiny.safetensors' was not trained as B4M" in told


# what is saved


def test_what_is_saved_is_what_was_dialled(bench: Bench, model: Any, before: Tensors) -> None:
    dials = {"content": 0.5, "style": 2.0}
    patched, b4m, _ = bench.run("PiTApplyB4M", model=model, b4m=load(bench), **dials).args
    after = bench.loaded(patched)
    for precision, kind, most in (("as it is", torch.float32, 1e-6), ("float16", torch.float16, 2e-2)):
        ui = bench.run("PiTSaveB4M", b4m=b4m, filename_prefix="a/mix", precision=precision).ui.as_dict()
        name = ui["text"][0].rpartition(" as ")[2]
        tensors, metadata = bench.part("pit_core.files").load_tensors(bench.folder / "output/loras" / name)
        assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {kind}
        assert all(key.startswith("lora_unet_") for key in tensors)
        assert sum(key.endswith(".alpha") for key in tensors) == len(bench.lora_shapes())
        assert metadata["pit_lora_kind"] == "B4M" and metadata["content"] == "0.5"
        again = weights(bench, model, bench.first("PiTLoadB4M", content_file=name))
        assert max(float((again[key] - after[key]).abs().max()) for key in after) < most


def test_a_loaded_pair_is_saved_bit_for_bit(bench: Bench) -> None:
    ui = bench.run("PiTSaveB4M", b4m=load(bench)).ui.as_dict()
    assert ui["text"][0] == "Saved 'content.safetensors' and 'style.safetensors' as b4m_00001_.safetensors"
    tensors, _ = bench.part("pit_core.files").load_tensors(
        bench.folder / "output/loras/b4m_00001_.safetensors"
    )
    c, s = halves(bench, 1), halves(bench, 2)
    for module in c:
        name = f"lora_unet_{module.replace('.', '_')}"
        assert torch.equal(tensors[f"{name}.lora_down.weight"], c[module][0])
        assert torch.equal(tensors[f"{name}.lora_up.weight"], s[module][1])
        assert tensors[f"{name}.alpha"] == 4


def test_cores_own_loader_does_the_same_with_what_we_save(real: RealBench, model: Any) -> None:
    import core_models

    patched, b4m, _ = real.run("PiTApplyB4M", model=model, b4m=load(real), content=0.5).args
    real.run("PiTSaveB4M", b4m=b4m)
    tensors, _ = real.part("pit_core.files").load_tensors(real.folder / "output/loras/b4m_00001_.safetensors")
    ours, theirs = (real.loaded(each) for each in (patched, core_models.with_lora(model, tensors)))
    assert changed(ours, theirs) == set()


# others


def test_it_stacks_with_other_loras_in_any_order(bench: Bench, model: Any, before: Tensors) -> None:
    b4m, other = load(bench), bench.lora_file(seed=9)
    first = bench.first("PiTIPLoRA", model=bench.first("PiTApplyB4M", model=model, b4m=b4m), file=other)
    last = bench.first("PiTApplyB4M", model=bench.first("PiTIPLoRA", model=model, file=other), b4m=b4m)
    a, b = bench.loaded(first), bench.loaded(last)
    assert changed(before, a) and max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6


def test_a_changed_file_is_read_again(bench: Bench) -> None:
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadB4M"]
    names = pair_of_files(bench)
    first = node.fingerprint_inputs(**names)
    file(bench, "style", halves(bench, 3), "kohya")
    assert node.fingerprint_inputs(**names) != first
    assert node.fingerprint_inputs(content_file="gone.safetensors", style_file=NONE) == "missing "


def test_the_miniatures_files_are_listed_first(bench: Bench, model: Any, shipped: Path) -> None:
    content = pair_of_files(bench)["content_file"]
    shutil.copy(bench.folder / "models/loras" / content, shipped / "b4m_content_1.safetensors")
    entries = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadB4M"].define_schema().inputs
    ours = "miniature: b4m content 1"
    assert entries[0].options == [ours, "content.safetensors", "style.safetensors"]
    assert entries[1].options == [NONE, *entries[0].options]
    assert bench.run("PiTLoadB4M", content_file=ours)[1].startswith("'b4m_content_1.safetensors': B4M")


def test_mistakes_are_one_sentence(bench: Bench, model: Any) -> None:
    names, b4m = pair_of_files(bench), load(bench)
    for node, inputs, words in [
        ("PiTLoadB4M", {**names, "style_file": "gone.safetensors"}, "style_file: There is no file 'gone"),
        ("PiTLoadB4M", {**names, "content_file": "../x.safetensors"}, "content_file: There is no file"),
        ("PiTApplyB4M", {"content": float("nan")}, "Expected content to be a finite number"),
        ("PiTApplyB4M", {"mode": "mix"}, "Expected the mode to be one of auto, splice, sum, got 'mix'"),
        ("PiTApplyB4M", {"blocks": "custom", "block_weights": "up"}, "block_weights: Expected block weights"),
        ("PiTApplyB4M", {"blocks": "custom", "block_weights": "x: 1"}, "b4m: There is no block 'x'"),
        ("PiTApplyB4M", {"b4m": "a file"}, "b4m is str, not B4M; connect 'Load B4M'"),
        ("PiTApplyB4M", {"model": "a model"}, "model is str, no diffusion model"),
        ("PiTSaveB4M", {"b4m": None}, "b4m is NoneType, not B4M"),
        ("PiTSaveB4M", {"b4m": b4m, "filename_prefix": "../../x"}, "."),
    ]:
        usual = {"model": model, "b4m": b4m} if node == "PiTApplyB4M" else {}
        with pytest.raises(bench.error, match=words) as error:
            bench.run(node, **{**usual, **inputs})
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_another_models_file_is_an_error(bench: Bench, model: Any) -> None:
    tensors = lora_tensors({"up_blocks.7.attentions.0.to_q": (32, 32)}, "b4m")
    bench.part("pit_core.files").save_tensors(bench.folder / "models/loras/odd.safetensors", tensors, {})
    b4m = bench.first("PiTLoadB4M", content_file="odd.safetensors")
    with pytest.raises(bench.error, match="b4m: .*made for another model"):
        bench.run("PiTApplyB4M", model=model, b4m=b4m)


# SDXL at its own size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_560_layers_of_sdxl_are_patched(real: RealBench, layout: str) -> None:
    from lora_files import lora_file, sdxl_shapes

    tensors = lora_file(sdxl_shapes(), rank=2, layout=layout)
    assert len(tensors) == 1120
    real.part("pit_core.files").save_tensors(real.folder / "models/loras/big.safetensors", tensors, {})
    b4m = real.first("PiTLoadB4M", content_file="big.safetensors", style_file="big.safetensors")
    model = real.sdxl()
    patched, _, report = real.run("PiTApplyB4M", model=model, b4m=b4m, content=0.5).args
    assert len(patched.patches) == 560 and model.patches == {}
    assert "model: 560 of 560 layers patched (input 192, middle 80, output 288)" in report
    assert "spliced, content 0.5, style 1, base 1, all blocks" in report
