"""What all solvers share: micro-batches, progress, seeds, trajectories, types, compiled models, no synchronization."""

from dataclasses import replace

import pytest
import torch
from oracles import SDES, mixture
from test_samplers import CALLS
from test_samplers import with_steps as on_grid
from torch.utils._python_dispatch import TorchDispatchMode

import solvers.base
from models import MLP, ScoreNetwork
from sde import VE, VP, DDPMChain, NCSNLevels, Noise, ScoreFunction, geometric_sigmas, linear_betas
from solvers import (
    DDIM,
    DDPM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
)
from solvers.sampler import Draws

ALL = [
    *(on_grid(sampler, 4) for sampler in CALLS),
    Langevin(4, adjusted=True),
    PredictorCorrector(DDIM(4, final="denoise"), Langevin(adjusted=True, corrections=2)),
    DDPM(DDPMChain(linear_betas(4, 0.2, 3.0))),
    AnnealedLangevin(NCSNLevels(geometric_sigmas(5.0, 0.05, 4)), 2, 1e-4),
]
"""Every sampler, at four steps."""


def network(dtype=torch.float64, shape=(2,)):
    """With weights that are not those of the start, at which it gives zeros."""
    model = ScoreNetwork(MLP(shape, width=16, depth=2), VP()).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * Noise(i).normal((1, p.numel()), dtype=dtype).reshape(p.shape))
    return model


# Micro-batches.


@pytest.mark.parametrize("solver", [*ALL, ProbabilityFlow(method="rk4", steps=4)], ids=str)
def test_micro_batches_change_nothing(solver):
    model, seen, told = mixture(VP()), [], []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    arguments = dict(shape=(7, 2), seed=3, dtype=torch.float64, trajectory=2)
    whole, calls = solver(model, **arguments), len(seen)
    seen.clear()
    parts = solver(model, **arguments, batch_size=3, callback=lambda i, x: told.append((i, len(x))))
    assert torch.allclose(parts.x, whole.x, rtol=1e-12, atol=1e-12)
    assert torch.allclose(parts.trajectory, whole.trajectory, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts.times, whole.times) and parts.trajectory.shape == whole.trajectory.shape
    assert parts.nfe == whole.nfe == calls and len(seen) == 3 * calls
    assert seen == [3] * calls + [3] * calls + [1] * calls
    steps = told[-1][0]
    assert told == [(i, size) for size in (3, 3, 1) for i in range(steps + 1)]


def test_micro_batches_of_an_adaptive_solver_agree_to_its_tolerance():
    whole, parts = (ProbabilityFlow()(mixture(VP()), shape=(7, 2), batch_size=size) for size in (None, 3))
    assert torch.allclose(parts.x, whole.x, atol=1e-3)


def test_a_batch_larger_than_the_samples_is_one():
    whole, parts = (DDIM(3)(mixture(VP()), shape=(5, 2), batch_size=size).x for size in (None, 100))
    assert torch.equal(whole, parts)


# The count of calls and the bar.


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_b7_calls_are_those_that_are_counted(sampler):
    model, seen = mixture(VP()), []
    model.register_forward_hook(lambda *_: seen.append(1))
    out = sampler(model, shape=(3, 2))
    assert out.nfe == len(seen) == sampler.calls


def test_b7_what_does_nothing_is_not_counted():
    """A predictor alone, a corrector alone, and the call that denoises."""
    corrected = PredictorCorrector(DDIM(30), Langevin(corrections=0))
    assert [s(mixture(VP()), shape=(2, 2)).nfe for s in (corrected, Langevin(30), DDIM(30, final="denoise"))] == [
        30,
        30,
        31,
    ]


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_nothing_is_printed_without_asking(capsys, sampler):
    sampler(mixture(VP()), shape=(3, 2))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size, parts", [(None, 1), (2, 3)])
def test_the_bar_counts_the_calls_of_all_parts(capsys, monkeypatch, batch_size, parts):
    bars = []
    make = solvers.base.tqdm
    monkeypatch.setattr(solvers.base, "tqdm", lambda **options: bars.append(make(**options)) or bars[-1])
    for sampler in (*ALL, ProbabilityFlow(method="rk4", steps=3)):
        sampler(mixture(VP()), shape=(5, 2), batch_size=batch_size, progress=True)
        out, err = capsys.readouterr()
        assert out == "" and type(sampler).__name__ in err, sampler
        if sampler.calls is not None:
            assert bars[-1].n == bars[-1].total == parts * sampler.calls, sampler


# Seed, noise, device and type.


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_the_seed_decides_and_given_noise_takes_the_place_of_the_prior(sampler):
    model = mixture(VP())
    one, again, other = (sampler(model, shape=(5, 2), seed=seed).x for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    noise = VP().prior((5, 2)).sample(1, dtype=torch.float64)
    assert torch.equal(sampler(model, x_T=noise, seed=1).x, one)
    same = torch.equal(sampler(model, x_T=noise, seed=2).x, one)
    assert same == (not sampler.stochastic)


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_every_draw_of_noise_has_a_number_of_its_own(monkeypatch, sampler):
    """0 for the prior, then others: noise that came again would tie one step to another, or to the start."""
    numbers, normal = [], Noise.normal

    def numbered(self, shape, draw=0, *rest, **named):
        numbers.extend(torch.as_tensor(draw).flatten().tolist())
        return normal(self, shape, draw, *rest, **named)

    monkeypatch.setattr(Noise, "normal", numbered)
    sampler(mixture(VP()), shape=(3, 2))
    assert numbers[0] == 0 and len(set(numbers)) == len(numbers)
    assert (len(numbers) > 1) == sampler.stochastic


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_the_type_is_the_models_unless_given(sampler):
    exact = mixture(VP())
    assert sampler(exact, shape=(3, 2)).x.dtype == torch.float64
    single = sampler(exact.float(), shape=(3, 2), dtype=torch.float32)
    assert single.x.dtype == torch.float32
    if not sampler.needs_density:
        for dtype in (torch.float32, torch.float64):
            assert sampler(network(dtype), shape=(3, 2)).x.dtype == dtype
            assert sampler(network(dtype), shape=(3, 2), device="cpu").x.device.type == "cpu"


def test_given_noise_is_cast_to_a_given_type():
    x_T = torch.zeros(3, 2)
    assert DDIM(2)(mixture(VP()), x_T=x_T, dtype=torch.float64).x.dtype == torch.float64
    assert x_T.dtype == torch.float32


# Trajectories.


@pytest.mark.parametrize("sampler", ALL, ids=str)
@pytest.mark.parametrize("every", [1, 3, 4, 9])
def test_every_sampler_keeps_every_kth_state_and_the_last(sampler, every):
    states = {}
    out = sampler(mixture(VP()), shape=(3, 2), trajectory=every, callback=lambda i, x: states.update({i: x.clone()}))
    kept = [i for i in range(5) if i % every == 0 or i == 4]
    assert torch.equal(out.trajectory, torch.stack([states[i] for i in kept])), kept
    assert torch.equal(out.times, sampler.times(VP())[kept].to(out.times))
    assert torch.equal(out.trajectory[-1], out.x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, found 0"),
        ({"batch_size": -3}, "batch_size must be a positive integer, found -3"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer, found 2.5"),
        ({"batch_size": True}, "batch_size must be a positive integer, found True"),
        ({"trajectory": -1}, "trajectory must be an integer of at least 0, found -1"),
        ({"trajectory": 2.5}, "trajectory must be an integer of at least 0, found 2.5"),
        ({"trajectory": True}, "trajectory must be an integer of at least 0, found True"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^64\), found -1"),
        ({"seed": 0.5}, r"seed must be an integer in \[0, 2\^64\), found 0.5"),
        ({"seed": 2**64}, "seed must be an integer"),
    ],
)
def test_bad_options_are_refused_before_the_first_call(arguments, message):
    model = mixture(VP())
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    for solver in (EulerMaruyama(2), ProbabilityFlow()):
        for start in ({"shape": (3, 2)}, {"x_T": torch.zeros(3, 2)}):
            with pytest.raises(ValueError, match=message):
                solver(model, **start, **arguments)


# No sample waits for another: the loop is left to the device.


READS = ("_local_scalar_dense", "nonzero", "aten.equal", "unique", "masked_select")


class Waiting(TorchDispatchMode):
    """Refuses what reads a value of a tensor into Python, or has a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in READS), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_no_step_reads_a_value(monkeypatch, sampler):
    """Every operation of ``step``; on a GPU one such read in a step is a wait for all that was queued."""
    model, steps = mixture(VP()), []
    step = type(sampler).step

    def watched(self, x, *rest):
        if self is not sampler:  # a predictor within
            return step(self, x, *rest)
        with Waiting():
            steps.append(1)
            return step(self, x, *rest)

    monkeypatch.setattr(type(sampler), "step", watched)
    sampler(model, shape=(3, 2))
    assert len(steps) == 4


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_more_steps_read_no_more_values(sampler):
    """After the plan, made on the CPU: the checks and draws between the steps, all that a read could hide in."""
    reads, counts = [], []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reads.extend([1] * any(word in str(function) for word in READS))
            return function(*args, **(kwargs or {}))

    for shorter in (sampler.with_steps(2), sampler.with_steps(4)):
        reads.clear()
        with Count():
            shorter(mixture(VP()), shape=(3, 2), trajectory=1, callback=lambda i, x: i or reads.clear())
        counts.append(len(reads))
    assert counts[0] == counts[1]


def test_the_watch_sees_what_it_is_for():
    for read in (float, bool, lambda x: x.item(), lambda x: x[x > 0], torch.nonzero):
        with pytest.raises(AssertionError), Waiting():
            read(torch.ones(()))


# Compiled models.


COMPILED = [
    DDIM(20, compile=True),
    PredictorCorrector(EulerMaruyama(10, compile=True), Langevin(snr=0.1)),
    ProbabilityFlow(method="rk4", steps=5, compile=True),
]


def uncompiled(solver):
    if isinstance(solver, PredictorCorrector):
        return PredictorCorrector(uncompiled(solver.predictor), solver.corrector)
    return replace(solver, compile=False)


# torch's own warning, in what it imports to compile.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_samples_alike_and_is_compiled_once(monkeypatch, backend):
    """One graph for all steps of all solvers; "eager" traces the model and leaves out the slow code generation."""
    torch._dynamo.reset()
    compiler, model, x_T = torch.compile, network(), Noise(1).normal((6, 2), dtype=torch.float64)
    monkeypatch.setattr(torch, "compile", lambda *a, **options: compiler(*a, **options, backend=backend))
    graphs = []
    for solver in COMPILED:
        torch._dynamo.utils.counters.clear()
        found, expected = solver(model, x_T=x_T, seed=4), uncompiled(solver)(model, x_T=x_T, seed=4)
        assert torch.allclose(found.x, expected.x, rtol=1e-6, atol=1e-6), solver
        assert found.nfe == expected.nfe == 20, solver
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 0, 0]


def test_what_can_not_be_compiled_is_refused():
    with pytest.raises(TypeError, match="compile=True needs a ScoreModel, found ScoreFunction; leave it out"):
        EulerMaruyama(2, compile=True)(ScoreFunction(VP(), lambda x, t: -x), shape=(2, 2))


# Traps of other implementations.


@pytest.mark.parametrize("sampler", ALL, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 37])
def test_b2_a_step_is_known_by_its_number(monkeypatch, sampler, steps):
    """0 to N - 1, each once and in order, with the times of the grid: none recovered from a time."""
    if isinstance(sampler, (DDPM, AnnealedLangevin)) and steps > 4:
        return
    sampler, seen = sampler.with_steps(steps), []
    step = type(sampler).step

    def watched(self, x, now, carry):
        if self is sampler:
            seen.append((now.index, float(now.t), float(now.s)))
        return step(self, x, now, carry)

    monkeypatch.setattr(type(sampler), "step", watched)
    sampler(mixture(VP()), shape=(2, 2))
    times = sampler.times(VP()).tolist()
    assert seen == [(i, times[i], times[i + 1]) for i in range(steps)]


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_b8_a_sample_depends_on_no_other(sampler):
    """Nor on the size of the batch, nor on companions a hundred times further out."""
    model = mixture(VE())
    x_T = VE().prior((6, 2)).sample(0, dtype=torch.float64)
    far = torch.cat((x_T[:1], 100 * x_T[1:]))
    found = [sampler(model, x_T=x, seed=3).x[0] for x in (x_T, x_T[:1], far)]
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-9)
    assert torch.allclose(found[0], found[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=str)
def test_b6_the_reverse_equation_without_noise_is_the_probability_flow(sde):
    """Euler-Maruyama at stochasticity 0 is Euler's method in time, step by step."""
    model, x_T = mixture(sde), sde.prior((4, 2)).sample(0, dtype=torch.float64)
    found = EulerMaruyama(7, stochasticity=0.0)(model, x_T=x_T).x
    expected = ProbabilityFlow(method="euler", steps=7, coordinates="time")(model, x_T=x_T).x
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("corrector", [Langevin(snr=0.1), Langevin(step_rule="song"), Langevin(adjusted=True)], ids=str)
def test_b5_correctors_work_under_every_process_and_with_every_predictor(corrector):
    for sde in SDES:
        for predictor in (EulerMaruyama(4), Ancestral(4, "log_snr"), DDIM(4, "log_snr"), Heun(4)):
            out = PredictorCorrector(predictor, corrector)(mixture(sde), shape=(3, 2))
            assert bool(torch.isfinite(out.x).all()), (sde, predictor)


def test_b26_a_grid_is_evaluated_from_its_first_time_and_to_its_last():
    """The first call is at t_max itself; no step is lost to rounding, for any number of steps."""
    for steps in (1, 2, 3, 10, 49, 1000):
        times = EulerMaruyama(steps).times(VP())
        assert float(times[0]) == VP().t_max and float(times[-1]) == VP().t_min and len(times) == steps + 1
        if steps < 100:
            seen, model = [], mixture(VP())
            model.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(float(arguments[1])))
            EulerMaruyama(steps)(model, shape=(1, 2))
            assert seen == times[:-1].tolist(), steps


def test_draws_of_one_shape_do_not_depend_on_another_or_on_the_batch():
    """A sampler that draws in two shapes, alone and in a batch so large that nothing is drawn ahead."""
    x = torch.zeros(40_000, 2)
    few, many = (Draws(Noise(3), x[:n]) for n in (2, len(x)))
    for _ in range(5):
        assert torch.equal(many.fresh(x)[:2], few.fresh(x[:2]))
        assert torch.equal(many.fresh(x[:, :1])[:2], few.fresh(x[:2, :1]))
    drawn = [few.fresh(x[:2]) for _ in range(200)] + [few.fresh(x[:2, :1]).expand(2, 2) for _ in range(200)]
    assert len({float(z[0, 0]) for z in drawn}) == 400
