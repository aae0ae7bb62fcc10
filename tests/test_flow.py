"""Rectified flow: the line, the target, the times, and the solvers against equations solved by hand."""

import math

import pytest
import torch

from pit_core import flow
from pit_core.errors import PitError


def grow(x, t):
    """dx/dt = x, so x(0) = x(1) / e."""
    return x


def test_interpolation_runs_from_data_to_noise_row_by_row():
    x0, noise = torch.full((3, 2, 4), 10.0), torch.full((3, 2, 4), -2.0)
    x = flow.interpolate(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x[:, 0, 0], torch.tensor([10.0, 7.0, -2.0]))


def test_the_target_is_the_slope_of_the_interpolation():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 8, 16, generator=generator, dtype=torch.float64)
    low, high = (flow.interpolate(x0, noise, torch.full((4,), t, dtype=torch.float64)) for t in (0.3, 0.7))
    assert torch.allclose((high - low) / 0.4, flow.velocity_target(x0, noise))


@pytest.mark.parametrize("name", list(flow.SOLVERS))
def test_a_straight_line_is_walked_exactly_in_any_number_of_steps(name):
    x0, noise = torch.randn(2, 1, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps in (1, 2, 7):
        end = flow.SOLVERS[name](lambda x, t: flow.velocity_target(x0, noise), noise, flow.schedule(steps))
        assert torch.allclose(end, x0, atol=1e-12)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_error_falls_with_the_order_of_the_solver(name, order):
    def error(steps):
        x = torch.ones(1, dtype=torch.float64)
        return abs(flow.SOLVERS[name](grow, x, flow.schedule(steps)).item() - math.exp(-1))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_the_order_holds_on_uneven_times_with_a_velocity_that_depends_on_time(name, order):
    def error(steps):
        times = [(1 - i / steps) ** 1.5 for i in range(steps + 1)]
        x = torch.ones(1, dtype=torch.float64)
        return abs(flow.SOLVERS[name](lambda x, t: x * math.cos(3 * t), x, times).item() - exact)

    exact = math.exp(-math.sin(3) / 3)
    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("name", "calls"), [("euler", 10), ("heun", 20), ("ab2", 10)])
def test_evaluations_per_run(name, calls):
    seen = []
    flow.SOLVERS[name](lambda x, t: seen.append(t) or x, torch.ones(1), flow.schedule(10))
    assert len(seen) == calls
    assert seen[0] == 1.0


@pytest.mark.parametrize("name", list(flow.SOLVERS))
def test_the_callback_sees_every_step_and_can_interrupt(name):
    seen = []
    flow.SOLVERS[name](
        grow, torch.ones(1), flow.schedule(4), lambda done, total, x: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done, total, x):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.SOLVERS[name](grow, torch.ones(1), flow.schedule(4), stop)


def test_solvers_leave_their_input_alone():
    for solve in flow.SOLVERS.values():
        x = torch.ones(3)
        solve(grow, x, flow.schedule(3))
        assert torch.equal(x, torch.ones(3))


def test_the_schedule_starts_late_for_a_low_strength():
    assert flow.schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert flow.schedule(25, 0.6)[0] == 15 / 25
    assert flow.schedule(25, 0.5)[0] == 13 / 25  # ceil(12.5)
    assert flow.schedule(25, 0.0) == [0.0]


def test_a_rounding_error_in_the_strength_adds_no_step():
    assert 25 * 0.28 > 7
    assert len(flow.schedule(25, 0.28)) == 8
    for steps in range(1, 101):
        for i in range(steps + 1):
            assert len(flow.schedule(steps, i / steps)) == i + 1


def test_logit_normal_times_are_repeatable_and_lie_inside_0_and_1():
    t = flow.logit_normal_times(20000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(t, flow.logit_normal_times(20000, generator=torch.Generator().manual_seed(3)))
    assert t.min() > 0 and t.max() < 1
    assert torch.logit(t).mean().abs() < 0.03
    assert torch.logit(t).std() == pytest.approx(1, abs=0.03)


def test_logit_normal_times_take_ready_normals():
    normals = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.equal(flow.logit_normal_times(normals=normals), torch.sigmoid(normals))
    with pytest.raises(PitError, match="not both"):
        flow.logit_normal_times(3, normals=normals)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "25", None])
def test_bad_step_counts_are_named(steps):
    with pytest.raises(PitError, match=r"at least 1 step, got"):
        flow.schedule(steps)


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf")])
def test_bad_strengths_are_named(strength):
    with pytest.raises(PitError, match=r"strength from 0 .* to 1"):
        flow.schedule(25, strength)


def test_an_unknown_solver_is_answered_with_the_known_ones():
    with pytest.raises(PitError, match="euler, heun, ab2, got 'dpm'"):
        flow.get_solver("dpm")
    assert flow.get_solver("heun") is flow.heun
