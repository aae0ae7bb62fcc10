"""`pit train`: models on the user's own data."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import group, plain_errors

if TYPE_CHECKING:
    from ..train.loop import Result

app = group("Train models on your own data.")


@app.command("ip-adapter")
@plain_errors
def train_ip_adapter(
    config: Annotated[Path, typer.Option(help="A YAML file: models, rows of pictures and texts, settings.")],
) -> None:
    """Train an IP-Adapter for SD1.5 or SDXL; goes on where an earlier run stopped."""
    from ..train.config import read_config
    from ..train.ip_adapter_run import PUBLISHED, AdapterSettings, run

    out = read_config(config, AdapterSettings).out
    _tell(run(config), out / PUBLISHED)


@app.command("ip-prior")
@plain_errors
def train_ip_prior(
    config: Annotated[Path, typer.Option(help="A YAML file: a folder of `pit data embed`, settings.")],
) -> None:
    """Train an IP-Prior on embedded part data; goes on where an earlier run stopped."""
    from ..train.config import read_config
    from ..train.ip_prior_run import PUBLISHED, PriorSettings, run
    from .previews import load_decoder

    out = read_config(config, PriorSettings).out
    _tell(run(config, decoder=load_decoder), out / PUBLISHED)


@app.command("ip-lora")
@plain_errors
def train_ip_lora(
    config: Annotated[Path, typer.Option(help="A YAML file: models, targets with references, settings.")],
) -> None:
    """Train an IP-LoRA for SDXL, so that text is heard at full image weight; goes on where it stopped."""
    from ..train.config import read_config
    from ..train.ip_lora_run import PUBLISHED, IPLoRASettings, run
    from .common import without_loading_bars

    out = read_config(config, IPLoRASettings).out
    without_loading_bars()
    _tell(run(config), out / PUBLISHED)


class B4MStage(str, Enum):
    """Content and style one by one, then both together."""

    CONTENT = "content"
    STYLE = "style"
    JOIN = "join"


@app.command("b4m")
@plain_errors
def train_b4m(
    stage: Annotated[B4MStage, typer.Argument(help="What is trained.", show_default=False)],
    config: Annotated[Path, typer.Option(help="A YAML file: the base, folders of pictures, settings.")],
) -> None:
    """Train a content and a style for SDXL that can be joined; goes on where an earlier run stopped."""
    from ..train.b4m_run import published, run, settings_of
    from .common import without_loading_bars

    file = published(settings_of(config, stage.value), stage.value)
    without_loading_bars()
    _tell(run(config, stage.value), file)


def _tell(result: Result, file: Path) -> None:
    """How a run has ended and where its model is; an interrupted one exits with 130."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        if result.finished:
            typer.echo(f"Finished at step {result.step}: {file}")
        else:
            typer.echo(f"Stopped at step {result.step}; the same command goes on from there. So far: {file}")
    if not result.finished:
        raise typer.Exit(130)
