"""Pictures and figures of an IP-Prior in training, by whatever draws its tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_parts
import tiny_stack
import torch
import yaml
from PIL import Image
from torch import Tensor

from pit_core.commands.previews import MiniatureDecoder, SdxlDecoder, load_decoder
from pit_core.concepts import Stack
from pit_core.errors import PitError
from pit_core.evaluate import concepts
from pit_core.files import load_tensors
from pit_core.ip_adapter.checkpoint import load_ip_adapter
from pit_core.ip_adapter.encode import load_image_encoder
from pit_core.ip_prior.info import PriorInfo
from pit_core.ip_prior.model import IPPrior
from pit_core.parts.augment import Augment
from pit_core.parts.embed import Encoder, embed
from pit_core.parts.views import Recipe
from pit_core.train.ip_prior_preview import PriorPreview
from pit_core.train.ip_prior_run import run
from pit_core.train.plot import read_log

AUGMENT = Augment(max_crops=2, sketch_prob=0.0, empty_prob=0.0, use_ref=True)


class Drawing:
    """Draws with a tiny SDXL; what it measures is how often it was asked."""

    def __init__(self, settings: PriorPreview) -> None:
        self.stack = tiny_stack.stack()
        self.adapter = self.stack.adapter
        self.drawn: list[int] = []
        self.asked: list[tuple[IPPrior, PriorInfo]] = []

    def draw(self, tokens: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        self.drawn.append(len(tokens))
        return self.stack.renderer.render(tokens, self.stack.null("grey"), tiny_stack.QUICK, seeds=seeds)

    def measure(self, prior: IPPrior, info: PriorInfo) -> dict[str, float]:
        self.asked.append((prior, info))
        return {"parts_kept": 0.25 * len(self.asked)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_stack.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of twenty and of ten wholes, by the adapter that `Drawing` draws."""
    root = tmp_path_factory.mktemp("data")
    encode = Encoder(
        tiny_stack.ImageEncoder(tiny_stack.image_encoder()), tiny_stack.adapter(tiny_stack.unet())
    )
    recipe = Recipe(tiny_parts.PIXELS, AUGMENT, views=1)
    for name, count in (("a", 20), ("b", 10)):
        embed(tiny_parts.write_set(root / name / "set", count), root / name, encode, recipe, quiet=True)
    return [root / "a", root / "b"]


def settings(tokens: Any, out: Path, /, **changes: Any) -> Path:
    train = {"steps": 3, "batch_size": 4, "lr": 1e-3, "log_every": 1, "save_every": 1, "ema_decay": 0.5}
    values: dict[str, Any] = {
        "tokens": [str(path) for path in tokens] if isinstance(tokens, list) else str(tokens),
        "out": str(out),
        "prior": {"hidden_dim": 32, "num_layers": 1, "num_attention_heads": 2},
        "validation": {"wholes": 2, "bins": 2},
        "train": train | changes.pop("train", {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(values | changes))
    return out / "config.yaml"


def published(out: Path) -> dict[str, Tensor]:
    return load_tensors(out / "ip_prior.safetensors")[0]


def test_previews_show_parts_and_concepts_and_change_nothing(tokens: list[Path], tmp_path: Path) -> None:
    made: list[Drawing] = []

    def decoder(settings: PriorPreview) -> Drawing:
        made.append(Drawing(settings))
        return made[-1]

    preview = {"model": "tiny", "count": 2, "every": 2, "seed": 5}
    run(settings(tokens[0], tmp_path / "shown", preview=preview), quiet=True, decoder=decoder)
    run(settings(tokens[0], tmp_path / "plain"), quiet=True)
    sheets = sorted((tmp_path / "shown" / "previews").iterdir())
    assert [path.name for path in sheets] == ["step-00000002.png", "step-00000003.png"]
    pictures = [Image.open(path).convert("RGB") for path in sheets]
    assert pictures[0].size == pictures[1].size and pictures[0].width > pictures[0].height
    (drawing,) = made
    # Parts and wholes once, with a reference each; the concepts at each of the two saves.
    given, again = drawing.drawn[:2], drawing.drawn[2:]
    assert again == [2, 2] and all(2 <= count <= 4 for count in given)
    log = tmp_path / "shown" / "log.jsonl"
    assert read_log(log, "parts_kept") == [(2, 0.25), (3, 0.5)]
    prior, info = drawing.asked[0]
    assert isinstance(prior, IPPrior) and (info.use_ref, info.max_crops) == (True, 2)
    with_previews, without = published(tmp_path / "shown"), published(tmp_path / "plain")
    assert all(torch.equal(with_previews[name], without[name]) for name in without)


def test_what_cannot_be_drawn_is_no_reason_to_end_a_training(tokens: list[Path], tmp_path: Path) -> None:
    class Failing(Drawing):
        def draw(self, tokens: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
            raise PitError("The picture turned into NaN.")

    config = settings(tokens[0], tmp_path, preview={"model": "tiny"}, train={"steps": 1})
    with pytest.warns(UserWarning, match=r"no preview step-00000001\.png: The picture turned into NaN"):
        assert run(config, quiet=True, decoder=Failing).finished
    assert not (tmp_path / "previews").exists()


def test_several_folders_are_trained_on_together_and_resume_exactly(
    tokens: list[Path], tmp_path: Path
) -> None:
    weights, once = {"weights": [1, 3]}, {"save_every": 3}
    run(settings(tokens, tmp_path / "by_size", train=once), quiet=True)
    run(settings(tokens, tmp_path / "whole", **weights, train=once), quiet=True)
    run(settings(tokens, tmp_path / "parts", **weights, train={"steps": 2, "save_every": 2}), quiet=True)
    run(settings(tokens, tmp_path / "parts", **weights, train=once), quiet=True)
    examples = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("by_size", "whole")]
    assert [each["examples"] for each in examples] == [28, 28]
    assert read_log(tmp_path / "by_size" / "log.jsonl") != read_log(tmp_path / "whole" / "log.jsonl")
    whole, parts = published(tmp_path / "whole"), published(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(PitError, match="was begun with other weights than"):
        run(settings(tokens, tmp_path / "parts", weights=[1, 2]), quiet=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preview": {"model": "tiny", "count": 0}}, "a count and an every of at least 1"),
        ({"preview": {"model": "tiny"}, "validation": {"wholes": 0}}, "none with parts is; hold out more"),
        ({"weights": [1, 2]}, "a weight above 0 for each of the 1 folders"),
        ({"tokens": []}, "at least one folder of tokens"),
        ({"tokens": [3]}, "entry 1 of 'tokens' in 'config.yaml' to be a path"),
    ],
)
def test_refuses_settings_that_do_not_fit(
    changes: dict[str, Any], said: str, tokens: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(PitError, match=said) as error:
        run(settings(tokens[0], tmp_path, **changes), quiet=True, decoder=Drawing)
    assert "\n" not in str(error.value) and not (tmp_path / "ip_prior.safetensors").exists()


def test_a_decoder_has_to_be_there_and_of_the_same_adapter(tokens: list[Path], tmp_path: Path) -> None:
    config = settings(tokens[0], tmp_path, preview={"model": "tiny"})
    with pytest.raises(PitError, match="nothing here that draws previews by 'tiny'"):
        run(config, quiet=True)

    class Other(Drawing):
        def __init__(self, settings: PriorPreview) -> None:
            super().__init__(settings)
            self.adapter.content_hash = "another"

    with pytest.raises(PitError, match="draws the tokens of 'tiny adapter', but .* of another adapter"):
        run(config, quiet=True, decoder=Other)


# what the command passes in


def test_the_command_draws_with_an_sdxl_of_the_users(models: Any, tmp_path: Path) -> None:
    """From start to end: its pictures are those of the files that the settings name."""
    encode = Encoder(load_image_encoder(models.image_encoder), load_ip_adapter(models.ip_adapter))
    recipe = Recipe(tiny_parts.PIXELS, AUGMENT, views=1)
    embed(tiny_parts.write_set(tmp_path / "set", 10), tmp_path / "tokens", encode, recipe, quiet=True)
    files = {name: str(getattr(models, name)) for name in ("sdxl", "image_encoder", "ip_adapter")}
    preview = {"model": "sdxl", "count": 1, **files}
    more = {"validation": {"wholes": 1, "bins": 1}, "train": {"steps": 1}}
    config = settings(tmp_path / "tokens", tmp_path / "out", preview=preview, **more)
    run(config, quiet=True, decoder=load_decoder)
    with Image.open(tmp_path / "out" / "previews" / "step-00000001.png") as sheet:
        assert sheet.width > 400
    assert read_log(tmp_path / "out" / "log.jsonl", "parts_kept") == []


def test_a_decoder_that_is_not_known_or_lacks_files_is_told() -> None:
    with pytest.raises(PitError, match="to be miniature or sdxl, got 'sd15'"):
        load_decoder(PriorPreview("sd15"))
    with pytest.raises(PitError, match="needs sdxl, image_encoder and ip_adapter"):
        SdxlDecoder(PriorPreview("sdxl", ip_adapter=Path("a")))


def test_the_miniature_draws_its_tokens() -> None:
    decoder = MiniatureDecoder(PriorPreview("miniature", judged=0))
    tokens = decoder.stack.null("white")
    (picture,) = decoder.draw(tokens, [0])
    assert picture.size == decoder.stack.renderer.default_size
    assert decoder.measure(decoder.stack.prior, decoder.stack.prior_info) == {}


def test_the_figure_is_the_priors_line_of_the_concepts_table(stack: Stack, judge: torch.nn.Module) -> None:
    assert concepts.of_prior(stack, judge, count=2, seed=3) == concepts.run(stack, judge, count=2, seed=3)[0]
