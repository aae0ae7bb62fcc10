"""The miniature's training, from pictures to shipped files, in small: few pictures, two steps a stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from pit_core.b4m.factors import load_factors
from pit_core.b4m.merge import basis_difference
from pit_core.concepts import make_concepts
from pit_core.errors import PitError
from pit_core.files import load_tensors, sha256_of
from pit_core.lora.formats import load_lora
from pit_core.lora.kinds import B4M, IP_LORA, PLAIN, kind_of
from pit_core.miniature import b4m, b4m_stages, models, train, trained
from pit_core.miniature.batches import Pictures, to_pixels
from pit_core.miniature.critters import render_part
from pit_core.miniature.data import concept_critter
from pit_core.miniature.export import LIMIT, export, note_figures
from pit_core.miniature.recipes import RECIPES, quick_precision
from pit_core.miniature.scale import scaled_config, set_scale
from pit_core.miniature.sets import (
    adapter_pictures,
    base_pictures,
    captioner,
    concept_pictures,
    pictures,
)
from pit_core.train.loop import Result, latest_checkpoint, load_average

SCALE = 0.0002

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first test waits for all stages


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, Result]]]:
    """A folder in which every stage was trained, and what `main` said of it."""
    out = tmp_path_factory.mktemp("miniature")
    return out, train.main(None, out, scale=SCALE)


@pytest.fixture(scope="module")
def out(chain: tuple[Path, list[tuple[str, Result]]]) -> Path:
    return chain[0]


@pytest.fixture(scope="module")
def weights(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    export(out, folder)
    return folder


def _fresh(out: Path, folder: Path) -> Path:
    """A folder with the same pictures and scale, but nothing trained."""
    shutil.copytree(out / "pictures", folder / "pictures")
    shutil.copy(out / "scale.json", folder)
    return folder


# training


def test_all_stages_run_in_order_to_their_end(chain: tuple[Path, list[tuple[str, Result]]]) -> None:
    out, results = chain
    assert list(train.STAGES) == list(RECIPES)
    assert [name for name, _ in results] == [name for name in train.STAGES if name not in b4m.AT_HOME]
    assert all(result.finished and result.step == 2 for _, result in results)
    for name, _ in results:
        assert latest_checkpoint(out / name) == out / name / "checkpoints" / "step-00000002"


def test_figures_are_kept_beside_the_checkpoints(out: Path) -> None:
    def metrics(stage: str) -> dict[str, float]:
        newest = latest_checkpoint(out / stage)
        assert newest is not None
        return json.loads((newest / "state.json").read_text())["metrics"]

    assert {"db"} <= metrics("vae").keys() and {"db"} <= metrics("decoder").keys()
    assert {"whole_state", "whole_colour"} <= metrics("vision").keys()
    assert {"clean_state", "damaged_state", "damaged_colour"} <= metrics("reader-judge").keys()


def test_an_interrupted_stage_goes_on_to_the_same_weights(out: Path, tmp_path: Path) -> None:
    again = _fresh(out, tmp_path)
    [(_, first)] = train.main("vae", again, minutes=0)
    assert not first.finished and first.step == 1
    [(_, second)] = train.main("vae", again)
    assert second.finished and second.step == 2
    whole, parts = (
        load_tensors(folder / "vae/checkpoints/step-00000002/ema.safetensors")[0] for folder in (out, again)
    )
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_stage_out_of_time_is_the_last(out: Path, tmp_path: Path) -> None:
    results = train.main(None, _fresh(out, tmp_path), minutes=0)
    assert [(name, result.finished) for name, result in results] == [("encoders", False)]


def test_a_finished_stage_is_not_trained_again(out: Path) -> None:
    before = sha256_of(out / "vae/checkpoints/step-00000002/ema.safetensors")
    [(_, result)] = train.main("vae", out)
    assert result.finished and result.step == 2
    assert sha256_of(out / "vae/checkpoints/step-00000002/ema.safetensors") == before


def test_an_unknown_stage_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="no stage 'unnet'; the stages are encoders, vision, vae"):
        train.main("unnet", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stage_before_its_turn_is_told_in_a_sentence(out: Path, tmp_path: Path) -> None:
    with pytest.raises(PitError, match="no checkpoint was found under .*encoders"):
        train.main("unet", _fresh(out, tmp_path))


@pytest.mark.parametrize(("vae", "decoder"), [(31.994, None), (32.5, 31.994), (float("nan"), None)])
@pytest.mark.parametrize("stage", ["unet", "unet-finish", "adapter", "adapter-finish"])
def test_nothing_learns_on_the_latents_of_a_poor_vae(
    tmp_path: Path, stage: str, vae: float, decoder: float | None
) -> None:
    _accepted(tmp_path, "vae", vae)
    if decoder is not None:
        _accepted(tmp_path, "decoder", decoder)
    with pytest.raises(PitError, match=r"reached (31.99|nan) dB, but .* only from 32 dB on"):
        train.main(stage, tmp_path)
    assert not (tmp_path / "pictures").exists()


def test_a_good_vae_is_let_pass_and_so_are_a_shipped_one_and_a_trial(tmp_path: Path) -> None:
    _accepted(tmp_path / "good", "vae", 31.0)
    _accepted(tmp_path / "good", "decoder", 32.0)
    train.require_good_vae(tmp_path / "good")
    train.require_good_vae(tmp_path / "shipped")
    _accepted(tmp_path / "trial", "vae", 12.0)
    set_scale(tmp_path / "trial", 0.5)
    train.require_good_vae(tmp_path / "trial")


def _accepted(out: Path, stage: str, db: float) -> None:
    """What a checkpoint notes of a VAE's figure."""
    state = out / stage / "checkpoints" / "step-00000002" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"metrics": {"db": db}}))


# scale


def test_a_folder_keeps_its_scale(out: Path, tmp_path: Path) -> None:
    with pytest.raises(PitError, match="was begun at scale 0.0002"):
        train.main("vae", out, scale=1.0)
    set_scale(out, SCALE)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(PitError, match="was begun at scale 1;"):
        set_scale(tmp_path, 0.5)
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(PitError, match="a scale above 0 and up to 1"):
            set_scale(tmp_path / "new", wrong)


def test_without_a_scale_recipes_are_as_written(tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        assert scaled_config(tmp_path, recipe, 3) == recipe


def test_with_a_scale_batches_are_no_larger_than_the_set(tmp_path: Path) -> None:
    set_scale(tmp_path, 0.01)
    recipe = RECIPES["prior"]
    config = scaled_config(tmp_path, recipe, 20)
    assert (config.steps, config.batch_size) == (recipe.steps // 100, 20)
    kept = asdict(recipe) | {"steps": config.steps, "batch_size": 20}
    assert asdict(config) == kept


# what trained stages are read back as


def test_bf16_is_left_to_processors_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = RECIPES["prior"]
    for capability, precision in (("AVX512", "bf16"), ("AVX2", "no"), ("DEFAULT", "no")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        assert quick_precision(recipe).precision == precision
    assert quick_precision(RECIPES["adapter"]) == RECIPES["adapter"]


def test_latents_are_standard_and_measured_anew_for_another_encoder(out: Path, tmp_path: Path) -> None:
    pixels = to_pixels(pictures(out, "world").pixels[:])
    vae = trained.trained_vae(out)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * models.SDXL_LATENT_SCALE
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2
    again = tmp_path / "again"
    shutil.copytree(out, again)
    average = again / "vae/checkpoints/step-00000002/ema.safetensors"
    average.write_bytes((again / "vae/checkpoints/step-00000002/model.safetensors").read_bytes())
    trained.trained_vae(again)
    _, measured = load_tensors(again / "vae/latents.safetensors")
    assert measured["of"] == trained.weights_of(again, "vae") != trained.weights_of(out, "vae")


def test_cached_latents_and_features_are_those_of_the_trained_models(out: Path) -> None:
    image, _ = trained.trained_encoders(out)
    rows = base_pictures(out).rows
    pixels = base_pictures(out).fetch([(0, 0), (0, len(rows) - 1)])["pixels"]
    chosen = rows[[0, -1]]
    features = np.load(out / "cache/features.npy")[chosen]
    with torch.no_grad():
        expected = models.image_features(image, pixels)
        latents = trained.trained_vae(out).encode(pixels).latent_dist.mode() * models.SDXL_LATENT_SCALE
    assert np.abs(features - expected.numpy()).max() < 2e-2
    assert np.abs(np.load(out / "cache/latents.npy")[chosen] - latents.numpy()).max() < 0.3  # bf16


def test_another_models_checkpoint_is_refused(out: Path) -> None:
    with pytest.raises(PitError, match="the stage reader-judge .* does not have the expected tensors"):
        trained.load_stage(trained.ReaderObjective(models.build_reader("tuning")), out, "reader-judge")


# export


def test_export_writes_all_files_and_their_manifest(weights: Path) -> None:
    manifest = models.read_manifest(weights)
    assert set(models.STACK_FILES) < set(manifest["files"])
    assert "reader_judge.safetensors" in manifest["files"]
    written = {str(path.relative_to(weights).as_posix()) for path in weights.rglob("*") if path.is_file()}
    assert written == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_of(weights / name)
        assert entry["bytes"] == (weights / name).stat().st_size
        assert entry["figures"] and [stage["steps"] for stage in entry["stages"]] == [2] * len(
            entry["stages"]
        )
    stages = {
        name: [stage["stage"] for stage in entry["stages"]] for name, entry in manifest["files"].items()
    }
    assert stages["vae/config.json"] == ["vae", "decoder"]
    assert stages["unet/diffusion_pytorch_model.safetensors"] == ["unet", "unet-further", "unet-finish"]
    assert stages["image_encoder.safetensors"] == ["encoders", "vision"]
    assert stages["text_encoder.safetensors"] == ["encoders"]
    assert manifest["bytes"] == sum(entry["bytes"] for entry in manifest["files"].values()) < LIMIT


def test_all_exported_weights_are_fp16(weights: Path) -> None:
    for path in weights.rglob("*.safetensors"):
        tensors, _ = load_tensors(path)
        dtypes = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")}
        assert dtypes == {torch.float16}, path.name


def test_a_joined_entity_ships_with_the_two_that_it_was_joined_from(weights: Path) -> None:
    files = [b4m_stages.b4m_file(stage) for stage in b4m.SHIPPED]
    content, style, entity = (load_lora(weights / file) for file in files)
    assert all(kind_of(lora) == B4M for lora in (content, style, entity))
    assert [lora.metadata["role"] for lora in (content, style, entity)] == ["content", "style", "entity"]
    assert len({lora.metadata["basis_hash"] for lora in (content, style, entity)}) == 1
    factors = [load_factors(weights / file)[0] for file in files]
    assert basis_difference(factors[0], factors[1])[0] == basis_difference(factors[0], factors[2])[0] == 0
    stages = models.read_manifest(weights)["files"][files[2]]["stages"]
    assert [stage["stage"] for stage in stages] == list(b4m.SHIPPED)


def test_what_a_joined_entity_is_compared_with_is_trained_and_exported_by_name(
    out: Path, tmp_path: Path
) -> None:
    for stage in ("b4m-plain-style-2", "b4m-shared-1-2"):
        [(_, result)] = train.main(stage, out)
        assert result.finished
        export(out, tmp_path, only=stage)
        lora = load_lora(tmp_path / b4m_stages.b4m_file(stage))
        assert kind_of(lora) == PLAIN and lora.ranks == {b4m_stages.RANK: 4 * 2 * 11}
        assert (
            b4m_stages.trained_b4m(out, stage).keys()
            == load_factors(tmp_path / lora.name.strip("'"))[0].keys()
        )
    assert not [name for name in models.read_manifest(tmp_path)["files"] if "join" in name]


def test_weights_over_the_limit_are_refused_and_nothing_changes(
    out: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(PitError, match="MB, but at most 0.5 MB may ship"):
        export(out, tmp_path, only="vae", limit=500_000)
    assert not list(tmp_path.iterdir())
    before = {path: path.read_bytes() for path in weights.rglob("*") if path.is_file()}
    with pytest.raises(PitError, match="may ship"):
        export(out, weights, only="vae", limit=1_000_000)
    assert {path: path.read_bytes() for path in weights.rglob("*") if path.is_file()} == before


def test_one_stage_is_exported_beside_the_others(out: Path, tmp_path: Path) -> None:
    export(out, tmp_path, only="reader-judge")
    assert set(models.read_manifest(tmp_path)["files"]) == {"reader_judge.safetensors"}
    both = export(out, tmp_path, only="prior")
    assert set(both["files"]) == {"reader_judge.safetensors", "ip_prior.safetensors"}
    with pytest.raises(PitError, match="no stage 'decoder' to export"):
        export(out, tmp_path, only="decoder")


def test_only_finished_stages_are_exported(out: Path, tmp_path: Path) -> None:
    little = tmp_path / "little"
    shutil.copytree(out / "reader-judge", little / "reader-judge")
    assert set(export(little, tmp_path / "weights")["files"]) == {"reader_judge.safetensors"}
    with pytest.raises(PitError, match="The stage unet has no checkpoint"):
        export(little, tmp_path / "weights", only="unet")


def test_shipped_weights_keep_the_stages_that_they_went_through(
    out: Path, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(weights, tmp_path / "out" / "shipped")
    shutil.copytree(out / "unet-finish", tmp_path / "out" / "unet-finish")
    later = export(tmp_path / "out", tmp_path / "weights", only="unet")
    before = models.read_manifest(weights)
    for name, entry in later["files"].items():
        assert [stage["stage"] for stage in entry["stages"]] == ["unet", "unet-further", "unet-finish"]
        assert entry["figures"] == before["files"][name]["figures"]


def test_figures_that_weights_were_accepted_at_are_added(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    before = models.read_manifest(weights)["files"]["ip_prior.safetensors"]
    note_figures({"ip_prior.safetensors": {"parts_kept": 0.912345}}, tmp_path / "weights")
    entry = models.read_manifest(tmp_path / "weights")["files"]["ip_prior.safetensors"]
    assert entry == {**before, "figures": {**before["figures"], "parts_kept": 0.9123}}
    with pytest.raises(PitError, match="does not list 'other.safetensors'; export it first"):
        note_figures({"other.safetensors": {}}, tmp_path / "weights")


# use


def test_the_exported_stack_draws_concepts(weights: Path) -> None:
    stack = models.load_stack(weights)
    assert stack.name == "miniature" and stack.hashes["ip_prior.safetensors"]
    part = render_part(concept_critter(1, 1), "body")
    concepts = make_concepts(stack, [part], count=2, seed=3, steps=2, prior_steps=2)
    assert [concept.image.size for concept in concepts] == [(128, 128)] * 2
    again = make_concepts(stack, [part], count=1, seed=4, steps=2, prior_steps=2)
    assert np.abs(np.asarray(again[0].image).astype(int) - np.asarray(concepts[1].image)).max() <= 1


def test_the_exported_stack_is_the_trained_one(out: Path, weights: Path) -> None:
    stack = models.load_stack(weights)
    picture = render_part(concept_critter(1, 1), "body")
    image, _ = trained.trained_encoders(out)
    adapter = trained.trained_adapter(out)
    with torch.no_grad():
        expected = adapter(models.image_features(image, to_pixels(np.asarray(picture)[None])))
    assert (stack.encode([picture]) - expected).abs().max() < 2e-2


def test_the_exported_ip_loras_fit_the_exported_models(weights: Path) -> None:
    stack = models.load_stack(weights)
    for kind in ("scene", "sheet"):
        lora = load_lora(weights / f"ip_lora_{kind}.safetensors")
        placed = stack.renderer.placed(lora)
        assert kind_of(lora) == IP_LORA and not placed.left and len(placed.model) == 4 * 2 * 11
        assert all(layer.up.any() for layer in lora.layers.values()), "it was trained"


def test_an_exported_file_that_was_changed_is_not_loaded(weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "weights"
    shutil.copytree(weights, broken)
    with (broken / "ip_prior.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(PitError, match="'ip_prior.safetensors' is damaged; install"):
        models.load_stack(broken)


# starting from the shipped weights


def test_shipped_weights_stand_in_for_untrained_stages(out: Path, weights: Path, tmp_path: Path) -> None:
    again = _fresh(out, tmp_path)
    trained.start_from_shipped(again, weights)
    [(_, result)] = train.main("unet-further", again)
    assert result.finished
    pixels = to_pixels(pictures(out, "world").pixels[:1])
    with torch.no_grad():
        ours, theirs = (
            vae.encode(pixels).latent_dist.mode()
            for vae in (trained.trained_vae(again), trained.trained_vae(out))
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)  # the shipped ones are fp16
    assert [result.finished for _, result in [*train.main("adapter", again), *train.main("prior", again)]]
    export(again, tmp_path / "exported", "unet")


def test_the_adapter_goes_on_from_the_shipped_one(out: Path, weights: Path, tmp_path: Path) -> None:
    again = _fresh(out, tmp_path)
    trained.start_from_shipped(again, weights)
    shipped = trained.trained_adapter(again).state_dict()
    encoders = trained.trained_encoders(again)
    begun = trained.adapter_objective(again, *encoders, trained.ADAPTER_STAGES[:1]).adapter
    assert all(torch.equal(begun.state_dict()[name], value) for name, value in shipped.items())

    [(_, result)] = train.main("adapter-finish", again)
    assert result.finished
    further = trained.trained_adapter(again).state_dict()
    assert any(not torch.equal(further[name], value) for name, value in shipped.items())
    _, average = load_average(again / "adapter-finish")
    assert all(torch.equal(further[name.removeprefix("adapter.")], value) for name, value in average.items())

    train.main("prior-finish", again)
    made_by = json.loads((again / "cache/tokens.json").read_text())["of"]
    assert made_by == trained.weights_of(again, "vision", "adapter-finish")
    manifest = export(again, tmp_path / "exported", "adapter")
    stages = [stage["stage"] for stage in manifest["files"]["ip_adapter_plus.safetensors"]["stages"]]
    assert stages == list(trained.ADAPTER_STAGES)
    manifest = export(again, tmp_path / "exported", "prior")
    stages = [stage["stage"] for stage in manifest["files"]["ip_prior.safetensors"]["stages"]]
    assert stages == list(trained.PRIOR_STAGES)


def test_the_prior_goes_on_from_the_shipped_one(out: Path, weights: Path, tmp_path: Path) -> None:
    again = _fresh(out, tmp_path)
    trained.start_from_shipped(again, weights)
    shipped, _ = load_tensors(weights / "ip_prior.safetensors")
    begun = trained.prior_before(again, "prior-finish").state_dict()
    assert all(torch.equal(begun[name], value.float()) for name, value in shipped.items())


def test_the_adapter_goes_on_with_more_of_the_mirrored_critters(out: Path) -> None:
    base, further, captions = base_pictures(out), adapter_pictures(out), captioner(out)

    def mirrored(pictures: Pictures) -> list[bool]:
        return [captions.picture(*pictures.place(i)).critter.pose.mirror for i in range(len(pictures))]

    assert set(further.rows) == set(base.rows)
    assert mirrored(further).count(True) == 3 * mirrored(base).count(True)
    assert mirrored(further).count(False) == mirrored(base).count(False)


def test_the_adapter_learns_at_last_mostly_on_concepts(out: Path) -> None:
    base, finish, captions = base_pictures(out), concept_pictures(out), captioner(out)
    concept = base.rows >= len(base.sets[0])
    for index, row in enumerate(base.rows):
        times = int((finish.rows == row).sum())
        if concept[index]:
            assert times == (6 if captions.picture(*base.place(index)).critter.pose.mirror else 2)
        else:
            assert times in (0, 1)
    assert (~concept).sum() // 2 <= (finish.rows < len(base.sets[0])).sum() <= (~concept).sum() // 2 + 1


def test_a_stage_trained_here_is_preferred_to_the_shipped_one(
    out: Path, weights: Path, tmp_path: Path
) -> None:
    again = _fresh(out, tmp_path)
    trained.start_from_shipped(again, weights)
    shipped = trained.weights_of(again, "vae")
    train.main("vae", again)
    assert trained.weights_of(again, "vae") == trained.weights_of(out, "vae") != shipped
