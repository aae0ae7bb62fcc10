"""Runs in ComfyUI: a LoRA of our trainer on SDXL at its own size. Arguments: file, its factors, strength."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE, FACTORS, STRENGTH = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import benches  # noqa: E402

folder = Path(tempfile.mkdtemp())
bench = benches.RealBench(Path.cwd(), folder)

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402

factors = bench.part("pit_core.files").load_tensors(FACTORS)[0]
model = bench.sdxl()
shapes = bench.host.shapes_of(model, bench.host.lora_keys(model))
names = bench.part("pit_core.lora.keys")
EVERY = 8  # rows of a weight, of which one is looked at: double precision takes its time
base = torch.randn(1280, 2048, generator=torch.Generator().manual_seed(1)) / 32


def worst(patched: Any) -> float:
    """How far the host's weights under the patches are from W + s B A, in double precision."""
    keys, errors = bench.host.lora_keys(model), []
    for module in {name.rpartition(".")[0] for name in factors}:
        name = names.kohya_name(module)
        rows, columns = shapes[name]
        before = base[:rows, :columns]
        after = comfy.lora.calculate_weight(patched.patches[keys[name]], before.clone(), keys[name])
        down, up = factors[f"{module}.down"].double(), factors[f"{module}.up"][::EVERY].double()
        expected = torch.addmm(before[::EVERY].double(), up, down, alpha=STRENGTH)
        errors.append(float((after[::EVERY] - expected).abs().max()))
        assert float((after[::EVERY] - before[::EVERY]).abs().max()) > 1e-3, module
    return max(errors)


by_core, _ = comfy.sd.load_lora_for_models(
    model, None, comfy.utils.load_torch_file(str(FILE), safe_load=True), STRENGTH, 0.0
)
(folder / "models/loras" / FILE.name).write_bytes(FILE.read_bytes())
by_us, _, report = bench.run("PiTIPLoRA", model=model, file=FILE.name, strength=STRENGTH).args
found = {
    name: {"patched": len(patched.patches), "worst": worst(patched)}
    for name, patched in (("core", by_core), ("ours", by_us))
}
print(json.dumps({**found, "report": report}))  # noqa: T201
