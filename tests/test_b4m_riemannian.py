"""The preconditioned optimizers against published numbers, and against one layer after the other."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import Parameter

from pit_core.b4m import riemannian
from pit_core.b4m.riemannian import RiemannianAdamW, RiemannianSGD
from pit_core.errors import PitError

log = logging.getLogger(__name__)
GOLDENS = Path(__file__).parent / "goldens"
SHAPES = [(24, 24), (24, 40), (16, 16), (24, 24), (24, 24)]  # (m, n)
RANK = 4


def golden(name):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "as halves"])
@pytest.mark.parametrize("name", ["riemannian_adamw", "riemannian_sgd"])
def test_three_steps_meet_the_golden(name, halves):
    tensors, metadata = golden(name)
    layers = sorted({key.split(".")[0] for key in tensors})
    parameters = {f"{n}.{s}": Parameter(tensors[f"{n}.{s}.before"]) for n in layers for s in ("down", "up")}

    def member(key):  # an empty frozen half changes nothing
        learnable = parameters[key]
        empty = learnable.detach()[:, :0] if key.endswith("down") else learnable.detach()[:0]
        return (empty, learnable) if halves else learnable

    settings = {"lr": float(metadata["lr"]), "weight_decay": float(metadata["weight_decay"])}
    if metadata["optimizer"] == "AdamWr":
        first, second = map(float, metadata["betas"].split(","))
        settings |= {"betas": (first, second), "eps": float(metadata["eps"])}
    kind = RiemannianAdamW if metadata["optimizer"] == "AdamWr" else RiemannianSGD
    pairs = [(member(f"{n}.down"), member(f"{n}.up")) for n in layers]
    optimizer = kind(pairs=pairs, damping=float(metadata["reg"]), **settings)
    for step in range(int(metadata["steps"])):
        for key, parameter in parameters.items():
            parameter.grad = tensors[f"{key}.grad{step}"].clone()
        optimizer.step()
    error = max((p - tensors[f"{key}.after"]).abs().max().item() for key, p in parameters.items())
    log.info("%s: largest error %.2e", name, error)
    assert error < 2e-6  # a decay at the wrong moment makes 2e-5


def layers(seed=0):
    """Random layers as halves: a, b, c, d."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        {
            "a": randn(m // 2, RANK),
            "b": Parameter(randn(m - m // 2, RANK)),
            "c": randn(RANK, n // 2),
            "d": Parameter(randn(RANK, n - n // 2)),
        }
        for m, n in SHAPES
    ]


def as_pairs(found):
    return [((layer["c"], layer["d"]), (layer["a"], layer["b"])) for layer in found]


def give_gradients(found, step):
    generator = torch.Generator().manual_seed(100 + step)
    for layer in found:
        for half in "bd":
            layer[half].grad = torch.randn(layer[half].shape, generator=generator, dtype=torch.float64)


class OneAfterTheOther:
    """The formulas as written, one layer at a time."""

    def __init__(self, found, adam, lr, weight_decay, damping, relative, betas=(0.9, 0.999), eps=1e-8):
        self.found, self.adam, self.lr, self.decay = found, adam, lr, weight_decay
        self.damping, self.relative, self.betas, self.eps = damping, relative, betas, eps
        self.moments, self.count = {}, 0

    def inverse(self, gram):
        if gram.trace().sqrt() <= 1e-6:
            return torch.eye(len(gram), dtype=gram.dtype)
        delta = self.damping * (gram.trace() / len(gram) if self.relative else 1)
        return torch.linalg.inv(gram + delta * torch.eye(len(gram), dtype=gram.dtype))

    @torch.no_grad()
    def step(self):
        self.count += 1
        if not self.adam:
            for layer in self.found:
                layer["b"] *= 1 - self.lr * self.decay
                layer["d"] *= 1 - self.lr * self.decay
        for number, layer in enumerate(self.found):
            u, v = torch.cat([layer["a"], layer["b"]]), torch.cat([layer["c"], layer["d"]], 1)
            gradients = {
                "b": layer["b"].grad @ self.inverse(v @ v.T),
                "d": self.inverse(u.T @ u) @ layer["d"].grad,
            }
            for half, gradient in gradients.items():
                self.move(layer[half], gradient, (number, half))

    def move(self, parameter, gradient, key):
        if not self.adam:
            parameter -= self.lr * gradient
            return
        (first, second), t = self.betas, self.count
        m, v = self.moments.get(key, (0, 0))
        m, v = first * m + (1 - first) * gradient, second * v + (1 - second) * gradient**2
        self.moments[key] = m, v
        parameter -= self.lr * (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + self.eps)
        parameter *= 1 - self.lr * self.decay


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("kind", [RiemannianAdamW, RiemannianSGD])
def test_batches_compute_what_one_layer_after_the_other_does(kind, relative, stacked, monkeypatch):
    monkeypatch.setattr(riemannian, "CPU_BATCH", 2 * RANK * 12)  # two layers at once, so three alike need two
    if stacked:  # as on a GPU
        monkeypatch.setattr(riemannian, "ONE_BY_ONE", ())
    found, expected = layers(), layers()
    found[2]["c"].zero_(), expected[2]["c"].zero_()
    with torch.no_grad():  # one layer without any V: not preconditioned
        found[2]["d"].zero_(), expected[2]["d"].zero_()
    settings = {"lr": 0.05, "weight_decay": 0.1, "damping": 0.3, "relative": relative}
    optimizer = kind(pairs=as_pairs(found), **settings)
    slow = OneAfterTheOther(expected, kind is RiemannianAdamW, **settings)
    for step in range(3):
        give_gradients(found, step), give_gradients(expected, step)
        optimizer.step(), slow.step()
    for ours, theirs in zip(found, expected, strict=True):
        for half in "abcd":
            torch.testing.assert_close(ours[half], theirs[half], rtol=1e-9, atol=1e-11)


def test_frozen_halves_stay_and_without_gradient_nothing_moves():
    found, before = layers(), layers()
    optimizer = RiemannianAdamW(pairs=as_pairs(found), lr=0.1, weight_decay=0.5)
    give_gradients(found, 0)
    found[1]["b"].grad = None
    optimizer.step()
    for number, (now, then) in enumerate(zip(found, before, strict=True)):
        assert torch.equal(now["a"], then["a"]) and torch.equal(now["c"], then["c"])
        assert not torch.equal(now["d"], then["d"])
        assert torch.equal(now["b"], then["b"]) == (number == 1)


def test_a_step_depends_on_the_product_alone():
    """Scaling U up and V down by the same number leaves dW, so the first step of SGD must change it alike."""

    def moved(scale):
        found = layers()[:1]
        down = Parameter(torch.cat([found[0]["c"], found[0]["d"].detach()], 1) / scale)
        up = Parameter(torch.cat([found[0]["a"], found[0]["b"].detach()]) * scale)
        before = (up @ down).detach()
        optimizer = RiemannianSGD(pairs=[(down, up)], lr=1e-4, weight_decay=0, damping=1e-9, relative=True)
        ((up @ down) ** 2).sum().backward()
        optimizer.step()
        return (up @ down - before).detach()

    torch.testing.assert_close(moved(1.0), moved(10.0), rtol=1e-6, atol=1e-12)


def test_training_continues_from_its_state_dict():
    straight, resumed = layers(), layers()
    first = RiemannianAdamW(pairs=as_pairs(straight), lr=0.05)
    for step in range(4):
        give_gradients(straight, step)
        first.step()
        if step == 1:
            state = copy.deepcopy(first.state_dict())
            with torch.no_grad():
                for ours, theirs in zip(resumed, straight, strict=True):
                    ours["b"].copy_(theirs["b"]), ours["d"].copy_(theirs["d"])
    second = RiemannianAdamW(pairs=as_pairs(resumed), lr=1.0)
    second.load_state_dict(state)
    for step in (2, 3):
        give_gradients(resumed, step)
        second.step()
    for ours, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(ours["b"], theirs["b"]) and torch.equal(ours["d"], theirs["d"])


def test_half_precision_is_preconditioned_in_single():
    down, up = Parameter(torch.ones(2, 4).bfloat16()), Parameter(torch.ones(4, 2).bfloat16())
    down.grad, up.grad = torch.ones_like(down), torch.ones_like(up)
    RiemannianSGD(pairs=[(down, up)], lr=1.0, weight_decay=0, damping=1.0).step()
    assert down.dtype == torch.bfloat16
    torch.testing.assert_close(up.float(), torch.full((4, 2), 1 - 1 / 9), rtol=0, atol=4e-3)


def test_weights_that_cannot_be_inverted_raise_before_anything_moves():
    found, before = layers(), layers()
    with torch.no_grad():
        found[-1]["d"][0, 0] = torch.nan
    optimizer = RiemannianAdamW(pairs=as_pairs(found))
    give_gradients(found, 0)
    with pytest.raises(PitError, match="damping"):
        optimizer.step()
    assert torch.equal(found[0]["b"], before[0]["b"]) and torch.equal(found[0]["d"], before[0]["d"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"damping": 0.0}, "damping"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"pairs": []}, "at least one"),
        ({"pairs": [(Parameter(torch.ones(4, 2)), Parameter(torch.ones(2, 3)))]}, "one rank"),
        ({"pairs": [(torch.ones(2, 4), Parameter(torch.ones(4, 2)))]}, "Parameter"),
        (
            {
                "pairs": [
                    ((Parameter(torch.ones(2, 4)), Parameter(torch.ones(2, 4))), Parameter(torch.ones(4, 2)))
                ]
            },
            "must not require",
        ),
    ],
)
def test_wrong_settings_are_named(change, message):
    settings = {"pairs": as_pairs(layers()), **change}
    with pytest.raises(PitError, match=message):
        RiemannianAdamW(**settings)
