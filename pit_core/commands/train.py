"""`pit train`: models on the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import group, plain_errors

app = group("Train models on your own data.")


@app.command("ip-adapter")
@plain_errors
def train_ip_adapter(
    config: Annotated[Path, typer.Option(help="A YAML file: models, rows of pictures and texts, settings.")],
) -> None:
    """Train an IP-Adapter for SD1.5 or SDXL; goes on where an earlier run stopped."""
    from ..train.ip_adapter_run import run

    run(config)
