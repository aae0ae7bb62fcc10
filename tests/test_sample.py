"""What `pit sample` keeps in a record beyond files: settings that come back as they were."""

import json
from dataclasses import asdict

import pytest

from pit_core.concepts import PriorSettings
from pit_core.errors import PitError
from pit_core.render import RenderSettings
from pit_core.sample import Settings


@pytest.mark.parametrize(
    "render",
    [RenderSettings(), RenderSettings(weight={0: 1.0, 10: 0.25}, size=(64, 32), prompt="крыло", steps=3)],
)
def test_settings_come_back_from_json_as_they_were(render: RenderSettings) -> None:
    settings = Settings(PriorSettings(steps=7, solver="heun"), render, as_sketch=True)
    assert Settings.from_record(json.loads(json.dumps(asdict(settings)))) == settings


@pytest.mark.parametrize(
    "change", [{"weight": {"first": 1.0}}, {"weight": {"0": "much"}}, {"weight": None}, {"size": 3}, {"x": 1}]
)
def test_damaged_settings_are_one_sentence(change: dict) -> None:
    record = asdict(Settings())
    record["render"] |= change
    with pytest.raises(PitError, match="settings are damaged or of another release"):
        Settings.from_record(record)
