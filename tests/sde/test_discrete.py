"""The chains of DDPM and NCSN: marginals, kernels, posteriors, parametrizations, schedules, and what is refused."""

import itertools
import math
import pickle

import mpmath
import pytest
import torch
from oracles import SDES, paper

from sde import (
    VE,
    VP,
    Cosine,
    DDPMChain,
    NCSNLevels,
    Prediction,
    RectifiedFlow,
    SubVP,
    cosine_betas,
    geometric_sigmas,
    largest_sigma,
    levels_for,
    linear_betas,
    sde_betas,
    sigma_ratio,
    step_size,
    variance_ratio,
)

HALF = torch.tensor(0.5)
CHAINS = [
    DDPMChain(),
    DDPMChain(linear_betas(50)),
    DDPMChain(cosine_betas(100)),
    DDPMChain(sde_betas(VP(), 10)),
    DDPMChain().respaced(37),
    DDPMChain((0.3,)),
    NCSNLevels(),
    NCSNLevels((3.0, 1.0, 0.1)),
]
PRESERVING = [sde for sde in SDES if (sde.alpha(HALF) ** 2 + sde.sigma(HALF) ** 2 - 1).abs().item() < 1e-6]


def close(a, b, rtol=1e-12, atol=1e-14):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.float64), rtol=rtol, atol=atol)


def all_k(chain, start=1):
    return torch.arange(start, chain.steps + 1)


# Marginals, kernels and posteriors.


@pytest.mark.parametrize("betas", [linear_betas(), linear_betas(50), cosine_betas(), sde_betas(VP(), 10)], ids=len)
def test_the_recursion_is_the_closed_form(betas):
    """x_k = sqrt(1 - beta) x_{k-1} + sqrt(beta) z: mean a <- sqrt(1 - beta) a, variance v <- (1 - beta) v + beta."""
    chain, a, v = DDPMChain(betas), 1.0, 0.0
    assert (float(chain.alpha(0)), float(chain.sigma(0)), float(chain.log_snr(0))) == (1.0, 0.0, math.inf)
    for k, beta in enumerate(betas, start=1):
        a, v = math.sqrt(1 - beta) * a, (1 - beta) * v + beta
        assert float(chain.alpha(k)) == pytest.approx(a, abs=1e-14), k
        assert float(chain.sigma(k)) ** 2 == pytest.approx(v, abs=1e-14), k
        assert float(chain.kernel(k - 1, k).std) ** 2 == pytest.approx(beta, rel=1e-10), k


def test_ncsn_counts_from_the_least_noise_and_lists_from_the_largest():
    levels = NCSNLevels((3.0, 1.0, 0.1))
    assert levels.sigma(torch.tensor([0, 1, 2, 3])).tolist() == [0.0, 0.1, 1.0, 3.0]
    assert levels.alpha(torch.tensor([0, 1, 2, 3])).tolist() == [1.0] * 4
    assert close(levels.beta(all_k(levels)), [0.01, 1 - 0.01, 9 - 1], rtol=1e-14)
    assert levels.prior((2, 3)).std == levels.prior_std == 3.0
    assert DDPMChain().prior((2, 3)).std == 1.0


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_kernels_compose(chain):
    indices = sorted({0, 1, chain.steps // 3, chain.steps // 2, chain.steps})
    for i, j, k in itertools.combinations_with_replacement(indices, 3):
        first, second, whole = chain.kernel(i, j), chain.kernel(j, k), chain.kernel(i, k)
        assert close(first.scale * second.scale, whole.scale), (i, j, k)
        assert close((second.scale * first.std) ** 2 + second.std**2, whole.std**2), (i, j, k)
        assert i != j or float(first.std) == 0
    k = all_k(chain, 0)
    from_data = chain.kernel(torch.zeros_like(k), k)
    assert close(from_data.scale, chain.alpha(k)) and close(from_data.std, chain.sigma(k))
    assert close(chain.kernel(all_k(chain) - 1, all_k(chain)).std ** 2, chain.beta(all_k(chain)))
    assert bool((chain.log_snr(k).diff() < 0).all())


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_posterior_is_bayes_rule(chain):
    """Conditioning the joint Gaussian of (x_{k-1}, x_k) given x_0 by linear algebra, in 40 digits."""
    x0, x_k = torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[-0.4, 2.0]]).double()
    alpha, sigma = (c.tolist() for c in chain.levels())
    with mpmath.workdps(40):
        for k in sorted({1, 2, chain.steps // 2 + 1, chain.steps} & set(range(1, chain.steps + 1))):
            scale, before, total = mpmath.mpf(alpha[k]) / alpha[k - 1], mpmath.mpf(sigma[k - 1]) ** 2, sigma[k] ** 2
            gain = scale * before / total  # Cov(x_{k-1}, x_k) / Var(x_k)
            for value in range(2):
                prior_mean = alpha[k - 1] * mpmath.mpf(float(x0[0, value]))
                mean = prior_mean + gain * (float(x_k[0, value]) - scale * prior_mean)
                found = chain.posterior(x0, x_k, k)
                assert float(found.mean[0, value]) == pytest.approx(float(mean), rel=1e-12, abs=1e-12), k
                # Relative to the step's own variance: Bayes' rule, unlike the code, subtracts.
                expected = float(before - gain * scale * before)
                assert float(found.variance) == pytest.approx(expected, rel=1e-9, abs=1e-12), k


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_variance_of_a_step_back_is_less_than_of_one_forward(chain):
    k = all_k(chain)
    beta, tilde = chain.beta(k), chain.beta_tilde(k)
    assert float(tilde[0]) == 0 and bool((tilde < beta).all())
    before = chain.sigma(k - 1) ** 2
    assert close(tilde, beta * before / chain.sigma(k) ** 2), chain
    assert close(1 / tilde[1:], 1 / before[1:] + chain.kernel(k[1:] - 1, k[1:]).scale ** 2 / beta[1:], rtol=1e-10)


def test_both_variances_agree_for_many_steps():
    ratios = []
    for n in (100, 1000, 10000):
        chain = DDPMChain(linear_betas(n))
        ratios.append(1 - float(chain.beta_tilde(n // 2) / chain.beta(n // 2)))
    assert ratios[0] / ratios[1] == pytest.approx(10, rel=0.05) and ratios[1] / ratios[2] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("betas", [linear_betas(), cosine_betas(100)], ids=len)
def test_the_reverse_step_is_that_of_ddpm(betas):
    """Ho et al., eqs. 7 and 11, with alpha_bar by multiplication."""
    chain, x_k, eps = DDPMChain(betas), torch.tensor([[0.3, -2.0]]).double(), torch.tensor([[1.1, 0.2]]).double()
    alpha_bar, before = 1.0, 1.0
    for k, beta in enumerate(betas, start=1):
        before, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        mean = (x_k - beta / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(1 - beta)
        found = chain.reverse(chain.from_eps(x_k, eps, k), k, "beta_tilde")
        assert close(found.mean, mean, rtol=1e-10), k
        assert float(found.variance) == pytest.approx((1 - before) / (1 - alpha_bar) * beta, rel=1e-10), k
        assert float(chain.reverse(Prediction(x_k, eps), k, "beta").variance) == pytest.approx(beta, rel=1e-10), k


# The continuous limits.


def test_alpha_bar_approaches_the_continuous_process():
    """4.04e-5 for 1000 steps against 4.32e-5; the error of log alpha_bar halves when N doubles."""
    exact = float(VP().alpha(torch.tensor(1.0, dtype=torch.float64)) ** 2)
    assert float(DDPMChain().alpha(1000) ** 2) == pytest.approx(4.04e-5, abs=5e-8)
    assert exact == pytest.approx(4.32e-5, abs=5e-8)
    errors = [abs(2 * float(DDPMChain(linear_betas(n)).alpha(n).log()) - math.log(exact)) for n in (250, 500, 1000)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)


def test_ncsn_increments_approach_the_diffusion():
    """sigma_k^2 - sigma_{k-1}^2 against g^2 dt at t = 0.5 of VE: a relative error of order 1 / N."""
    errors = []
    for n in (101, 201, 401):
        levels, k = NCSNLevels(geometric_sigmas(levels=n)), (n + 1) // 2
        errors.append(float(levels.beta(k)) / (paper(VE(), 0.5)[3] / (n - 1)) - 1)
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.1)
    assert abs(errors[0]) < 0.1


@pytest.mark.parametrize("sde", PRESERVING, ids=str)
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_sde_betas_have_the_marginals_of_the_process(sde, steps):
    chain, k = DDPMChain(sde_betas(sde, steps)), torch.arange(1, steps + 1)
    rtol = 1e-5 if sde.learned else 1e-10  # a learned schedule is in float32
    inner = k[: max(1, steps - 1)] if isinstance(sde, Cosine) else k  # it stops short of t_max, where alpha is 0
    times = inner.double() / steps * sde.t_max
    if not isinstance(sde, Cosine):
        assert close(chain.alpha(inner), sde.alpha(times).detach(), rtol=rtol)
        assert close(chain.sigma(inner), sde.sigma(times).detach(), rtol=rtol)
    assert all(0 < beta < 1 for beta in chain.betas)


def test_the_cosine_schedule_is_that_of_the_paper():
    with mpmath.workdps(40):
        offset, quarter = mpmath.mpf("0.008"), mpmath.pi / 2

        def f(k):
            return mpmath.cos((mpmath.mpf(k) / 1000 + offset) / (1 + offset) * quarter) ** 2

        expected = [min(1 - f(k) / f(k - 1), mpmath.mpf("0.999")) for k in range(1, 1001)]
    assert cosine_betas() == pytest.approx([float(beta) for beta in expected], rel=1e-11)
    assert cosine_betas()[-1] == 0.999


def test_b3_too_few_steps_are_refused_by_both_names():
    for steps in (1, 10, 20):
        with pytest.raises(ValueError, match=rf"beta_max / steps = 20.0 / {steps} and must be below 1"):
            linear_betas(steps)
    assert DDPMChain(linear_betas(21)).steps == 21
    for steps in (1, 2, 10, 20):
        assert all(0 < beta < 1 for beta in sde_betas(VP(), steps)), steps
    assert linear_betas()[0] == pytest.approx(1e-4, rel=1e-14) and linear_betas()[-1] == pytest.approx(0.02, rel=1e-14)
    assert torch.tensor(linear_betas()).diff().std() < 1e-8


# Parametrizations, variances and weights.


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_parametrizations_give_one_pair(chain):
    k = all_k(chain)
    x0, eps = torch.randn(2, len(k), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_k = chain.perturb(x0, k, eps)
    mean = chain.mean(Prediction(x0, eps), k)
    assert close(mean, chain.posterior(x0, x_k, k).mean, rtol=1e-11, atol=1e-12)
    for name, pair in {
        "eps": chain.from_eps(x_k, eps, k),
        "x0": chain.from_x0(x_k, x0, k),
        "mean": chain.from_mean(x_k, mean, k),
    }.items():
        # Each loses digits where its own quantity says little about the other.
        scale = 1 + float((chain.sigma(k) / chain.alpha(k)).max() + (chain.alpha(k) / chain.sigma(k)).max())
        assert close(pair.x0, x0, atol=1e-12 * scale) and close(pair.eps, eps, atol=1e-12 * scale), name
        assert close(chain.perturb(pair.x0, k, pair.eps), x_k, rtol=1e-11, atol=1e-12 * scale), name
        assert close(chain.mean(pair, k), mean, rtol=1e-11, atol=1e-12 * scale), name


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_learned_variance_lies_between_the_two(chain):
    k = all_k(chain)
    second = chain.beta_tilde(2) if chain.steps > 1 else chain.beta(1)
    clipped = torch.cat([second.reshape(1), chain.beta_tilde(k)[1:]])
    assert close(chain.variance(k, 1.0), chain.beta(k)) and close(chain.variance(k, 0.0), clipped)
    assert close(chain.variance(k, 0.3), chain.beta(k) ** 0.3 * clipped**0.7)
    assert torch.equal(chain.variance(k, "beta"), chain.beta(k))
    assert torch.equal(chain.variance(k, "beta_tilde"), chain.beta_tilde(k))
    weights = torch.rand(len(k), 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = chain.reverse(Prediction(weights, weights), k, weights).variance
    assert each.shape == weights.shape and close(each[:, 0, 0], chain.variance(k, weights[:, 0, 0]))
    assert close(each[0, 0, 0], chain.beta(1) ** weights[0, 0, 0] * second ** (1 - weights[0, 0, 0]))
    per_sample = chain.reverse(Prediction(weights, weights), k, weights[:, 0, 0]).variance
    assert per_sample.shape == (len(k), 1, 1) and close(per_sample[:, 0, 0], each[:, 0, 0])


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.5])
def test_the_weight_of_the_simple_loss(variance):
    """beta^2 / (2 sigma^2 alpha (1 - alpha_bar)), and the change of the KL of the two Gaussians with eps."""
    chain = DDPMChain()
    k = torch.arange(2, 1001)
    beta = torch.tensor(chain.betas, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)[1:]
    spread = chain.variance(k, variance)
    assert close(chain.eps_weight(k, variance), beta[1:] ** 2 / (2 * spread * (1 - beta[1:]) * (1 - alpha_bar)), 1e-10)
    for chain in CHAINS:
        k = all_k(chain, min(2, chain.steps))
        x_k, eps, eps_hat = torch.randn(3, len(k), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        apart = chain.mean(chain.from_eps(x_k, eps, k), k) - chain.mean(chain.from_eps(x_k, eps_hat, k), k)
        by_means = apart.square().sum(1) / (2 * chain.variance(k, variance))
        if chain.steps > 1:
            assert close(chain.eps_weight(k, variance) * (eps - eps_hat).square().sum(1), by_means, rtol=1e-7), chain
    assert float(DDPMChain().eps_weight(1, "beta_tilde")) == math.inf


# Indices, types and devices.


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5), (3, 1, 2, 2)], ids=str)
def test_data_of_any_rank(shape):
    chain, x = DDPMChain(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([1, 500, 1000])
    whole = chain.reverse(chain.from_x0(chain.perturb(x, k, x), x, k), k, "beta")
    for i, one in enumerate(k.tolist()):
        part = slice(i, i + 1)
        alone = chain.reverse(chain.from_x0(chain.perturb(x[part], one, x[part]), x[part], one), one, "beta")
        assert torch.allclose(whole.mean[part], alone.mean) and whole.variance.reshape(3)[i] == alone.variance
        for found in (chain.posterior(x, x, k), chain.posterior(x, x, one)):
            assert found.mean.shape == shape and found.mean.dtype == torch.float32


def test_any_integer_is_an_index():
    chain = DDPMChain()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        k = torch.tensor([3, 100], dtype=dtype)
        assert torch.equal(chain.sigma(k), torch.stack([chain.sigma(3), chain.sigma(100)])), dtype
        assert chain.sigma(k[0]).shape == () and chain.sigma(k[0]) == chain.sigma(3), dtype


@pytest.mark.parametrize("k", [1.0, torch.tensor(1.0), torch.tensor([1.0, 2.0]), True, torch.tensor(True)], ids=str)
def test_a_float_is_no_index(k):
    chain, x = DDPMChain(), torch.zeros(2, 1)
    for call in (
        chain.alpha,
        chain.beta,
        chain.variance,
        lambda k: chain.perturb(x, k, x),
        lambda k: chain.kernel(0, k),
    ):
        with pytest.raises(TypeError, match="k must be an int or a tensor of integers, found"):
            call(k)


@pytest.mark.parametrize(
    "k, low", [(-1, 0), (11, 0), (0, 1), (torch.tensor([1, 11]), 0), (torch.tensor(0), 1)], ids=str
)
def test_an_index_out_of_range_is_refused(k, low):
    chain = DDPMChain(linear_betas(10, 0.1, 5.0))
    for call in (
        (chain.alpha, chain.sigma, chain.log_snr) if low == 0 else (chain.beta, chain.beta_tilde, chain.variance)
    ):
        with pytest.raises(ValueError, match=rf"k must lie in {low}\.\.10, found (-1|11|0)"):
            call(k)
    with pytest.raises(ValueError, match=r"k must have the shape \(\) or \(B,\), found \(2, 1\)"):
        chain.alpha(torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="needs j <= k, found j=3, k=2"):
        chain.kernel(3, 2)


def test_b16_tables_follow_the_device_of_index_and_data():
    """The "meta" device stands for a GPU: a table left on the CPU would meet an index that is not."""
    chain = NCSNLevels()
    k, x = torch.ones(3, dtype=torch.long, device="meta"), torch.zeros(3, 2, device="meta")
    assert chain.sigma(k).device.type == "meta" and chain.sigma(k).shape == (3,)
    assert chain.sigma(k[0]).device.type == "meta" and chain.sigma(k[0]).shape == ()
    for index in (k, k[0], 5):
        pair = chain.from_eps(x, x, index)
        for found in (
            chain.perturb(x, index, x),
            *pair,
            *chain.reverse(pair, index),
            chain.posterior(x, x, index).mean,
        ):
            assert found.device.type == "meta" and found.dtype == torch.float32
    assert chain.langevin_step(k, 1e-6).shape == (3,)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_float32_agrees_with_float64(chain):
    k = all_k(chain)
    x0, eps = torch.randn(2, len(k), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = chain.reverse(Prediction(x0, eps), k, 0.5)
    found = chain.reverse(Prediction(x0.float(), eps.float()), k, 0.5)
    assert found.mean.dtype == torch.float32
    assert torch.allclose(found.mean.double(), exact.mean, rtol=1e-6, atol=1e-6 * float(exact.mean.abs().max()))
    assert torch.allclose(found.variance.double(), exact.variance, rtol=1e-5)


def test_tables_made_without_gradients_serve_training():
    chain = DDPMChain(linear_betas(77))
    x = torch.ones(2, 1, requires_grad=True)
    with torch.inference_mode():
        chain.perturb(torch.ones(2, 1), 5, torch.ones(2, 1))
    chain.perturb(x, 5, x).sum().backward()
    assert torch.allclose(x.grad, (chain.alpha(5) + chain.sigma(5)).float().expand(2, 1))


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_chain_is_a_value(chain):
    numbers = chain.betas if isinstance(chain, DDPMChain) else chain.sigmas
    for other in (type(chain)(list(numbers)), pickle.loads(pickle.dumps(chain))):
        assert other == chain and hash(other) == hash(chain) and {chain: 1}[other]
    assert len(repr(chain)) < 60


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_respaced_chain_has_the_marginals_of_its_indices(chain):
    for steps in sorted({1, 2, 3, chain.steps // 3, chain.steps - 1, chain.steps} & set(range(1, chain.steps + 1))):
        fewer = chain.respaced(steps)
        spaced = (
            torch.linspace(1, chain.steps, steps, dtype=torch.float64) if steps > 1 else torch.tensor([chain.steps])
        )
        kept = torch.floor(spaced + 0.5 + 1e-9).long()
        assert fewer.steps == steps and len(set(kept.tolist())) == steps and kept[-1] == chain.steps
        # A beta near 1 keeps few digits of 1 - beta.
        assert close(fewer.alpha(all_k(fewer)), chain.alpha(kept), rtol=1e-9), steps
        assert close(fewer.sigma(all_k(fewer)), chain.sigma(kept)), steps
    assert chain.respaced(chain.steps) == chain
    for steps in (0, chain.steps + 1, 2.0, True):
        with pytest.raises(ValueError, match=rf"respaced steps must be an integer in 1\.\.{chain.steps}, found"):
            chain.respaced(steps)


# The choices of NCSNv2.


def test_the_largest_sigma_is_the_greatest_distance():
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    brute = max(float((a - b).norm()) for a, b in itertools.combinations(x, 2))
    for chunk in (1, 7, 50, 1024):
        assert largest_sigma(x, chunk) == pytest.approx(brute, rel=1e-12), chunk
    assert largest_sigma(x.float() + 1000.0) == pytest.approx(brute, rel=1e-3)
    assert largest_sigma(x[:1]) == 0


@pytest.mark.parametrize("dimension", [5, 10, 64, 3072, 10**6])
def test_the_ratio_solves_its_equation(dimension):
    g, root = sigma_ratio(dimension), math.sqrt(2 * dimension)
    with mpmath.workdps(30):
        overlap = mpmath.ncdf(root * (g - 1) + 3 * g) - mpmath.ncdf(root * (g - 1) - 3 * g)
    assert float(overlap) == pytest.approx(0.5, abs=1e-9)
    assert g > 1


def test_the_step_after_some_langevin_steps_is_the_recursion():
    """Proposition 3: a point, noise g s_i at the start, x <- x - a x / s_i^2 + sqrt(2 a) z, in units of s_i."""
    for ratio, number, u in ((1.04, 5, 0.06), (1.5, 3, 0.5), (1.0376, 1, 1.3)):
        v = ratio**2
        for _ in range(number):
            v = (1 - u) ** 2 * v + 2 * u
        assert variance_ratio(u * 0.01**2, ratio, number, 0.01) == pytest.approx(v, rel=1e-12)
        s, e = 0.01, u * 0.01**2
        printed = 2 * e / (s**2 - s**2 * (1 - e / s**2) ** 2)
        assert (1 - e / s**2) ** (2 * number) * (ratio**2 - printed) + printed == pytest.approx(v, rel=1e-10)


@pytest.mark.parametrize("ratio", [1.001, 1.0376, 1.3, 3.0])
@pytest.mark.parametrize("number", [1, 5, 100])
def test_no_other_step_size_comes_closer(ratio, number):
    best = step_size(ratio, number, 0.01)
    miss = abs(variance_ratio(best, ratio, number, 0.01) - 1)
    for u in torch.logspace(-8, 0, 4001, dtype=torch.float64).tolist():
        assert abs(variance_ratio(u * 1e-4, ratio, number, 0.01) - 1) >= miss - 1e-12, u
    assert 0 < best <= 1e-4 and step_size(ratio, number, 1.0) == pytest.approx(best * 1e4, rel=1e-9)


def test_the_paper_s_settings_for_cifar10():
    """sigma from 50 to 0.01, L = 232, T = 5, epsilon = 6.2e-6 (NCSNv2, table of appendix B).

    Technique 4 at the ratio of those 232 levels gives epsilon = 6.18e-6: the paper's, rounded. Technique 2 alone does
    not give 232 but 220 levels: its equation has the ratio 1.0398, and the paper's ratio 1.0376 an overlap of 0.57.
    """
    ratio = 5000 ** (1 / 231)
    assert step_size(ratio, 5, 0.01) == pytest.approx(6.2e-6, abs=0.05e-6)
    assert variance_ratio(6.2e-6, ratio, 5, 0.01) == pytest.approx(1.0555, abs=1e-4)
    assert sigma_ratio(3072) == pytest.approx(1.0398, abs=1e-4) and sigma_ratio(3072) == pytest.approx(ratio, rel=0.003)
    assert levels_for(50, 0.01, sigma_ratio(3072)) == 220
    assert levels_for(50, 0.01, ratio) == 232
    sigmas = geometric_sigmas()
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (232, 50.0, 0.01)
    assert [a / b for a, b in itertools.pairwise(sigmas)] == pytest.approx([ratio] * 231, rel=1e-12)


def test_the_steps_of_annealed_langevin_dynamics():
    levels = NCSNLevels()
    found = levels.langevin_step(all_k(levels), 6.2e-6)
    assert close(found.flip(0), [6.2e-6 * s**2 / levels.sigmas[-1] ** 2 for s in levels.sigmas])
    assert float(found[0]) == 6.2e-6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DDPMChain((0.1, 1.0)), r"each beta must lie in \(0, 1\), found beta_2 = 1.0"),
        (lambda: DDPMChain((0.0, 0.1)), r"found beta_1 = 0.0"),
        (lambda: DDPMChain((math.nan,)), "found beta_1 = nan"),
        (lambda: DDPMChain(()), "at least one beta, found none"),
        (lambda: DDPMChain((0.999,) * 1000), "alpha_N .* is 0 in float64"),
        (lambda: linear_betas(0), "steps must be a positive integer, found 0"),
        (lambda: linear_betas(10.0), "steps must be a positive integer, found 10.0"),
        (lambda: linear_betas(1000, 2.0, 1.0), "0 < beta_min <= beta_max"),
        (lambda: cosine_betas(10, largest=1.0), r"largest in \(0, 1\)"),
        (lambda: sde_betas(VE()), "needs a variance-preserving SDE.* found VE"),
        (lambda: sde_betas(SubVP()), "needs a variance-preserving SDE.* found SubVP"),
        (lambda: sde_betas(RectifiedFlow()), "needs a variance-preserving SDE.* found Rectified"),
        (lambda: NCSNLevels((1.0, 2.0)), r"must decrease strictly.* found sigmas\[0\] = 1.0, sigmas\[1\] = 2.0"),
        (lambda: NCSNLevels((1.0, 1.0)), "must decrease strictly"),
        (lambda: NCSNLevels((1.0, 0.0)), "must be positive"),
        (lambda: NCSNLevels(()), "at least one"),
        (lambda: geometric_sigmas(levels=1), "levels must be an integer of at least 2, found 1"),
        (lambda: geometric_sigmas(1.0, 2.0), "0 < smallest < largest"),
        (lambda: sigma_ratio(4), "dimensions from 5 on, found 4"),
        (lambda: levels_for(1.0, 2.0, 1.1), "largest > smallest > 0 and ratio > 1"),
        (lambda: step_size(1.0, 5, 0.01), "ratio > 1"),
        (lambda: step_size(1.1, 0, 0.01), "steps_per_level >= 1"),
        (lambda: DDPMChain().variance(1, "gamma"), "DDPMChain: variance must be 'beta', 'beta_tilde' or a weight in"),
        (lambda: DDPMChain().variance(1, 1.5), "found 1.5"),
        (lambda: DDPMChain().variance(1, torch.tensor([0.5, -0.1])), r"a weight in \[0, 1\]"),
    ],
)
def test_what_can_not_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
