"""What must hold on a CUDA device; skipped without one."""

import json
from dataclasses import replace

import pytest
import torch
from configurations import configuration

from experiments import training
from experiments.audit import bits_per_dim
from experiments.centres import DiscreteDecoder, TruncatedNormal
from experiments.data import digits
from experiments.dequantization import Uniform
from experiments.order import batches, fits
from experiments.problem import Problem
from experiments.run import Run
from experiments.stepper import PRECISIONS, LossScale, Stepper, StepSettings
from experiments.variational import Variational
from models import (
    DPS,
    MLP,
    MMPS,
    Classifier,
    ClassifierFree,
    DenoisingScoreMatching,
    GaussianMixture,
    Mask,
    PiGDM,
    Replacement,
    ScoreNetwork,
    UNet,
)
from sde import EDM, VE, VP, Cosine, DDPMChain, LearnedSchedule, Noise, RectifiedFlow, SubVP, linear_betas
from solvers import (
    DDIM,
    DDPM,
    AdaptiveSDE,
    Ancestral,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Exact,
    ExponentialAdams,
    Heun,
    Hutchinson,
    HutchPlusPlus,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    RePaint,
    ReverseDiffusion,
    RungeKutta4,
    Sampler,
    SDEDPMSolver,
    UniPC,
    continuous_elbo,
    elbo,
    inconsistency,
    line_likelihood,
    log_likelihood,
    matched_prior,
    sample,
    simulate,
    solver_error,
)

pytestmark = pytest.mark.gpu
SOLVERS = [
    EulerMaruyama(steps=20),
    Ancestral(steps=20, grid="log_snr"),
    DDIM(steps=20, grid="karras"),
    Heun(steps=10),
    PredictorCorrector(EulerMaruyama(steps=20), Langevin()),
    ProbabilityFlow(),
    ProbabilityFlow(method="rk4", steps=20),
    DDPM(DDPMChain(linear_betas(40))),
    EulerMaruyama(steps=20, stochasticity=0.5),
    ReverseDiffusion(steps=20, grid="log_snr"),
    SDEDPMSolver(steps=20),
    AdaptiveSDE(rtol=0.1, atol=0.05),
    Euler(steps=20, grid="log_snr"),
    Heun(steps=10, churn=5.0),
    RungeKutta4(steps=5),
    DPMSolver(steps=20, order=3),
    UniPC(steps=20, order=3),
    ExponentialAdams(steps=20),
    ExponentialAdams(steps=20, order=3, adaptive=False),
    Langevin(steps=20, grid="log_snr", adjusted=True),
    RePaint(DDIM(steps=20), rounds=2, jump=5),
]
SDES = [VP(), SubVP(), VE(), Cosine(), EDM(), RectifiedFlow(), LearnedSchedule().requires_grad_(False)]


def mixture(sde):
    covariance = torch.tensor([[[0.5, 0.3], [0.3, 0.4]], [[0.2, 0.0], [0.0, 0.1]]])
    return GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), covariance, sde)


def test_noise_is_the_same_on_every_device():
    words = [Noise(7).words((5, 9), 3, device) for device in ("cpu", "cuda")]
    assert torch.equal(words[0], words[1].cpu())


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_samples_are_those_of_the_cpu(sde, solver):
    cpu, gpu = (solver(mixture(sde).to(device), shape=(64, 2), seed=1) for device in ("cpu", "cuda"))
    assert gpu.x.is_cuda and gpu.nfe == cpu.nfe
    assert torch.allclose(gpu.x.cpu(), cpu.x, atol=1e-3)


SEEN, HALF = torch.tensor([0.4, 0.0]), torch.tensor([1, 0])
CONDITIONAL = {
    "classifier free": lambda m: ClassifierFree(m, torch.arange(64) % 2, 2.0),
    "classifier": lambda m: Classifier(m, m.log_class, 1.0, label=1),
    "DPS": lambda m: DPS(m, Mask(HALF), SEEN, 0.5),
    "PiGDM": lambda m: PiGDM(m, Mask(HALF), SEEN, 0.1),
    "MMPS": lambda m: MMPS(m, Mask(HALF), SEEN, 0.1),
    "replacement": lambda m: Replacement(m, SEEN, HALF),
}


@pytest.mark.parametrize("wrap", CONDITIONAL.values(), ids=CONDITIONAL)
@pytest.mark.parametrize("solver", [DDIM(steps=20), EulerMaruyama(steps=20)], ids=str)
def test_conditional_samples_are_those_of_the_cpu(wrap, solver):
    cpu, gpu = (solver(wrap(mixture(VP())).to(device), shape=(64, 2), seed=1) for device in ("cpu", "cuda"))
    assert gpu.x.is_cuda and (gpu.nfe, gpu.backward) == (cpu.nfe, cpu.backward)
    assert torch.allclose(gpu.x.cpu(), cpu.x, atol=1e-2)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if isinstance(s, Sampler)], ids=str)
def test_the_loop_never_waits_for_the_device(solver):
    """Between the callbacks of the first and of the last step any wait of the host is an error."""
    modes = {0: "error", solver.steps: "default"}
    try:
        solver(
            mixture(VP()).cuda(),
            shape=(64, 2),
            callback=lambda i, x: i in modes and torch.cuda.set_sync_debug_mode(modes[i]),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", [DDIM(steps=20), ExponentialAdams(steps=20), Heun(steps=10)], ids=str)
def test_a_compiled_model_samples_alike(solver):
    model = ScoreNetwork(MLP((2,)), VP()).cuda()
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.1)
    plain, compiled = (one(model, shape=(64, 2), seed=3) for one in (solver, replace(solver, compile=True)))
    assert compiled.nfe == plain.nfe and torch.allclose(compiled.x, plain.x, atol=1e-4)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_simulated_paths_and_bounds_are_those_of_the_cpu(sde):
    x0, chain = Noise(3).normal((64, 2)), DDPMChain(linear_betas(30))
    paths = [simulate(sde, x0.to(device), 20, grid="log_snr").x.cpu() for device in ("cpu", "cuda")]
    assert torch.allclose(*paths, rtol=1e-3, atol=1e-3)
    bounds = [elbo(mixture(sde).to(device), x0.to(device), chain, draws=2) for device in ("cpu", "cuda")]
    assert torch.allclose(bounds[0].log_prob, bounds[1].log_prob.cpu(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_densities_in_one_pass_and_along_the_line_are_those_of_the_cpu(sde):
    x = Noise(3).normal((64, 2))
    found = [log_likelihood(mixture(sde).to(d), x.to(d), method="one_pass", steps=40) for d in ("cpu", "cuda")]
    for name in ("log_prob", "prior", "change", "error"):
        cpu, gpu = (getattr(one, name) for one in found)
        assert gpu.is_cuda and torch.allclose(gpu.cpu(), cpu, rtol=1e-3, atol=2e-3), name
    lines = [line_likelihood(mixture(sde).to(d), x.to(d), 40).cpu() for d in ("cpu", "cuda")]
    assert torch.allclose(*lines, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_samples_with_densities_and_the_continuous_bound_are_those_of_the_cpu(sde):
    options = dict(shape=(64, 2), seed=2, return_log_prob=True, rtol=1e-5, atol=1e-5)
    cpu, gpu = (sample(mixture(sde).to(device), **options) for device in ("cpu", "cuda"))
    assert gpu.x.is_cuda and gpu.log_prob.is_cuda
    assert torch.allclose(gpu.x.cpu(), cpu.x, atol=1e-2) and torch.allclose(gpu.log_prob.cpu(), cpu.log_prob, atol=2e-2)
    x0 = mixture(sde).sample(32)
    bounds = [continuous_elbo(mixture(sde).to(d), x0.to(d), points=8, draws=2).log_prob.cpu() for d in ("cpu", "cuda")]
    assert torch.allclose(*bounds, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("covariance, rank", [("diagonal", None), ("full", None), ("low_rank", 2)])
def test_a_matched_prior_is_that_of_the_cpu(covariance, rank):
    data, x = Noise(1).normal((50, 1, 2, 3)) @ torch.ones(3, 3).triu(), Noise(2).normal((7, 1, 2, 3))
    cpu, gpu = (matched_prior(data.to(d), VP(beta_max=5.0), covariance, rank=rank)(x.to(d)) for d in ("cpu", "cuda"))
    assert gpu.is_cuda and torch.allclose(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4)


def test_dequantization_is_that_of_the_cpu():
    k = (Noise(1).words((32, 1, 4, 4), 0) % 17).to(torch.uint8)
    flow = Variational(17, -1.0, 1.0, (1, 4, 4))
    for i, parameter in enumerate(flow.parameters()):
        parameter.data += 0.1 * Noise(i).normal((1, parameter.numel())).reshape(parameter.shape)
    around = [kind.of(VP(t_min=1e-3), 17) for kind in (TruncatedNormal, DiscreteDecoder)]
    for dequantizer in (Uniform(17), *around, flow.eval()):
        cpu = dequantizer.draw(k, seed=4, number=2, first=3)
        gpu = (dequantizer.cuda() if dequantizer is flow else dequantizer).draw(k.cuda(), seed=4, number=2, first=3)
        assert gpu.x.is_cuda and torch.allclose(gpu.x.cpu(), cpu.x, rtol=0, atol=1e-5), dequantizer
        assert torch.allclose(gpu.log_weight.cpu(), cpu.log_weight, rtol=1e-4, atol=1e-2), dequantizer


@pytest.mark.parametrize("options", [{}, {"draws": 2, "importance": True}, {"rtol": 1e-4}], ids=str)
def test_bits_per_dim_are_those_of_the_cpu(options):
    model = ScoreNetwork(MLP((4,)), VP(t_min=1e-3), "v")
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.1)
    k = (Noise(1).words((32, 4), 0) % 17).to(torch.uint8)
    cpu, gpu = (bits_per_dim(model.to(d), k.to(d), Uniform(17), ode_subset=4, **options) for d in ("cpu", "cuda"))
    assert gpu.value == pytest.approx(cpu.value, abs=1e-3) and gpu.stderr == pytest.approx(cpu.stderr, abs=1e-3)
    for name, value in cpu.parts().items():
        assert gpu.parts()[name] == pytest.approx(value, abs=2e-3), name
    x = Noise(3).normal((8, 4)).cuda()
    assert inconsistency(model, x).is_cuda and solver_error(model, x, samples=4, steps=20).rms < 0.1


DIVERGENCES = [Exact(), Exact(chunk=2), Hutchinson(probes=2), Hutchinson(2, "orthogonal"), HutchPlusPlus(4)]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_likelihoods_are_those_of_the_cpu(divergence):
    model = ScoreNetwork(MLP((2,)), VP())
    torch.nn.init.normal_(model.net.last[-1].weight, std=0.1)
    x = Noise(0).normal((64, 2))
    cpu, gpu = (
        log_likelihood(model.to(device), x.to(device), divergence, endpoint_correction=True)
        for device in ("cpu", "cuda")
    )
    assert torch.allclose(gpu.log_prob.cpu(), cpu.log_prob, atol=1e-3)


def test_training_and_evaluation_run(tmp_path):
    problem, device = Problem.of(digits()), torch.device("cuda")
    config = configuration("train.steps=200", "train.log_every=50", "likelihood.samples=32")
    model = training.train(config, problem, device, Run(tmp_path, "train"))
    found = bits_per_dim(model, problem.data.test[:32], convention=problem.convention(), rtol=1e-4)
    assert found.value < 2.4  # below the per-pixel histogram
    assert json.loads((tmp_path / "summary.json").read_text())["training"]["steps"] == 200


STEP = StepSettings(batch_size=16, clip=0.5, ema=0.99)


def stepper(settings=STEP, device="cuda", sde=None):
    """On the same weights everywhere, with the same times and noise on each device."""
    model = ScoreNetwork(UNet((1, 8, 8), channels=16, multipliers=(1, 2)), sde or VP()).to(device)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.1 * Noise(i).normal((1, parameter.numel())).reshape(parameter.shape).to(device)
    return Stepper(model, DenoisingScoreMatching().to(device), settings, torch.Generator(device).manual_seed(0))


def stepped(one, steps=6):
    """After steps whose data and rates change: weights, average, moments."""
    for i in range(steps):
        x = Noise(50 + i).normal((16, 1, 8, 8)).to(one.device)
        one(x, 1e-3 * (i + 1))
    moments = [one.optimizer.state[p][key] for p in one.parameters for key in ("exp_avg", "exp_avg_sq")]
    return [*one.model.state_dict().values(), *one.average.state.values(), *moments]


@pytest.mark.parametrize(
    ("options", "close"),
    [
        ({"cuda_graphs": True}, 1e-5),
        ({"cuda_graphs": True, "accumulate": 4}, None),
        ({"channels_last": True}, 1e-3),
        ({"fused": False}, 1e-5),
        ({"compile": True}, 1e-3),
        ({"compile": True, "cuda_graphs": True}, 1e-3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the compiler's own
def test_a_step_by_other_means_is_the_step(options, close):
    plain = replace(STEP, accumulate=options.get("accumulate", 1))
    expected, found = stepped(stepper(plain)), stepped(stepper(replace(STEP, **options)))
    for a, b in zip(expected, found, strict=True):
        assert b.is_cuda and torch.allclose(a, b, rtol=close or 1e-5, atol=close or 1e-5)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}], ids=str)
@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the compiler's own
def test_in_half_precision_all_that_is_kept_is_float32(precision, options):
    one = stepper(replace(STEP, precision=precision, channels_last=True, **options))
    assert {value.dtype for value in stepped(one)} == {torch.float32}
    read = one.tally.read()
    assert read.steps == 6 and read.good >= 3
    reference = stepper()
    stepped(reference)
    if read.good == 6:
        assert read.loss == pytest.approx(reference.tally.read().loss, rel=3e-2)


def test_a_scale_that_is_too_large_falls_inside_a_recorded_step():
    one = stepper(replace(STEP, precision="float16", cuda_graphs=True))
    one.scale.value.fill_(2.0**40)
    stepped(one, 8)
    assert one.scale.value.item() == 2.0**32 and one.tally.read().good == 0
    assert isinstance(one.scale, LossScale) and all(p.isfinite().all() for p in one.parameters)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}], ids=str)
def test_a_bad_step_changes_nothing(options):
    one = stepper(replace(STEP, **options))
    before = [value.clone() for value in stepped(one)]
    one(torch.full((16, 1, 8, 8), torch.nan, device="cuda"), 1e-3)
    after = stepped(one, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert one.tally.read().first == 7


@pytest.mark.parametrize("sde", [VP(), VE(), RectifiedFlow()], ids=str)
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"precision": "bfloat16", "accumulate": 2}], ids=str)
def test_a_step_never_waits_for_the_device(options, sde):
    one = stepper(replace(STEP, **options), sde=sde)
    stepped(one, 5)
    x = Noise(0).normal((16, 1, 8, 8)).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        one(x, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_average_is_applied_between_recorded_steps():
    one, other = (stepper(replace(STEP, cuda_graphs=True)) for _ in range(2))
    stepped(one), stepped(other)
    with one.average.applied(one.model):
        assert torch.equal(next(one.model.parameters()), next(iter(one.average.state.values())))
    for a, b in zip(stepped(one), stepped(other), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batches_from_the_host_are_of_the_data():
    problem, device = Problem.of(digits()), torch.device("cuda")
    config = configuration("train.batch_size=32", "train.data_on_device=false")
    x = next(batches(problem, config, device, torch.Generator(device).manual_seed(0)))
    assert x.is_cuda and x.shape == (32, 1, 8, 8)
    levels = problem.dequantizer.quantize(x).cpu().flatten(1)
    known = {tuple(k) for k in problem.data.train.flatten(1).tolist()}
    assert all(tuple(k) in known for k in levels.tolist())
    assert fits(problem.data.train, device)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # the compiler's own
def test_training_with_the_preset_for_a_gpu(tmp_path):
    problem = Problem.of(digits())
    config = configuration("train=gpu", "train.steps=100", "train.log_every=25", "train.cuda_graphs=true")
    model = training.train(config, problem, torch.device("cuda"), Run(tmp_path, "train"))
    assert model.score(torch.zeros(2, 1, 8, 8, device="cuda"), torch.tensor(0.5, device="cuda")).isfinite().all()
