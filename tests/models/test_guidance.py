"""Models around models: the invariant, scale 0 and 1, exact guidance of a mixture, rows of samples, refusals."""

import pytest
import torch
from oracles import CENTRE, CORRELATED, SOME_SDES, correlated, mixture, times

from models import (
    DPS,
    MLP,
    MMPS,
    Blend,
    Classifier,
    ClassifierFree,
    Conditioned,
    GaussianMixture,
    Guided,
    Mask,
    Matrix,
    NoisyClassifier,
    PiGDM,
    Replacement,
    Rotated,
    ScoreNetwork,
    colorization,
)
from models.conjugate_gradients import conjugate_gradients
from sde import VE, VP, Noise, PerSample, RectifiedFlow, of_samples
from solvers import DDIM, AdaptiveSDE, Ancestral, EulerMaruyama, Exact, Heun, ProbabilityFlow, RePaint, log_likelihood

ROW = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
SEEN = torch.tensor([0.3], dtype=torch.float64)
KNOWN = torch.tensor([1.0, 0.0], dtype=torch.float64)
TURN = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
WRAPPERS = {
    "conditioned": lambda m: Conditioned(m, 1),
    "blend": lambda m: Blend(m, Conditioned(m, 0), 0.3),
    "classifier free": lambda m: ClassifierFree(m, 1, 3.0),
    "classifier": lambda m: Classifier(m, m.log_class, 2.0, label=0),
    "guided": lambda m: Guided(m, lambda x0: -x0.square().sum(1), 0.7),
    "DPS": lambda m: DPS(m, Matrix(ROW), SEEN, 0.5),
    "PiGDM": lambda m: PiGDM(m, Matrix(ROW), SEEN, 0.1, data_std=0.7),
    "MMPS": lambda m: MMPS(m, Matrix(ROW), SEEN, 0.1),
    "replacement": lambda m: Replacement(m, KNOWN, torch.tensor([1, 0])),
    "replacement of one noise": lambda m: Replacement(m, KNOWN, torch.tensor([1, 0]), fresh=False),
    "rotated": lambda m: Rotated(m, TURN),
    "rotated replacement": lambda m: Rotated(Replacement(Rotated(m, TURN), KNOWN, torch.tensor([1, 0])), TURN.mT),
    "around a wrapper": lambda m: MMPS(ClassifierFree(m, 1, 2.0), Matrix(ROW), SEEN, 0.1),
    "under another": lambda m: ClassifierFree(m, 1, 2.0).under(VE(sigma_min=0.05, t_max=2.0)),
}


def noised(model, n=6, seed=3):
    """Points of the scale of p_t at several times, each with a time of its own."""
    sde, t = model.sde, times(model.sde, n)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    return alpha * model.sample(n, seed) + sigma * Noise(seed).normal((n, 2), 9, dtype=torch.float64), t


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_pair_keeps_its_invariant(wrap, sde):
    inner = mixture(sde)
    model = wrap(inner)
    t = times(model.sde, 6)
    alpha, sigma = model.sde.alpha(t)[:, None], model.sde.sigma(t)[:, None]
    x = alpha * inner.sample(6) + sigma * Noise(1).normal((6, 2), 0, dtype=torch.float64)
    pair = model(x, t)
    assert torch.isfinite(pair.x0).all() and torch.isfinite(pair.eps).all(), wrap
    error = (alpha * pair.x0 + sigma * pair.eps - x).abs() / (alpha * pair.x0).abs().clamp_min(1)
    assert error.max() < 1e-11, error


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_singular_ends_are_finite(wrap):
    model = wrap(mixture(RectifiedFlow()))
    for t in (model.sde.t_max, model.sde.t_min):
        pair = model(torch.ones(3, 2, dtype=torch.float64), torch.tensor(t, dtype=torch.float64))
        assert torch.isfinite(pair.x0).all() and torch.isfinite(pair.eps).all(), t


def network(classes=3, sde=None):
    torch.manual_seed(4)
    net = MLP(shape=(2,), width=16, depth=2, classes=classes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ScoreNetwork(net, sde or VP(), parametrization="v")


@pytest.mark.parametrize("sde", [VP(), RectifiedFlow()], ids=str)
@pytest.mark.parametrize("solver", [DDIM(steps=4), EulerMaruyama(steps=4), Heun(steps=3)], ids=str)
def test_scale_0_and_1_are_the_models_themselves_bit_for_bit(solver, sde):
    model, noise = network(sde=sde), torch.randn(5, 2)
    plain, told = (solver(m, x_T=noise) for m in (model, Conditioned(model, 2)))
    assert not torch.equal(plain.x, told.x)
    for scale, expected in ((0, plain), (1, told)):
        found = solver(ClassifierFree(model, 2, scale), x_T=noise)
        assert torch.equal(found.x, expected.x) and found.nfe == expected.nfe, scale
    for wrapped in (
        Classifier(model, lambda x, t: -x.square().sum(1), 0.0),
        Guided(model, lambda x0: -x0.square().sum(1), 0),
        MMPS(model, Matrix(ROW), SEEN, 0.1, scale=0),
    ):
        found = solver(wrapped, x_T=noise)
        assert torch.equal(found.x, plain.x) and (found.nfe, found.backward) == (plain.nfe, 0), wrapped


def test_the_prediction_is_affine_in_the_scale():
    model, x, t = network(), torch.randn(4, 2), torch.tensor(0.4)
    none, one = model(x, t), Conditioned(model, 1)(x, t)
    for scale in (-1.0, 0.25, 0.5, 0.75, 4.0):
        found = ClassifierFree(model, 1, scale)(x, t)
        for a, b, c in zip(none, one, found, strict=True):
            assert torch.allclose(c, a + scale * (b - a), atol=1e-5), scale


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_the_exact_classifier_gives_the_exact_conditional(sde):
    model = mixture(sde)
    x, t = noised(model)
    for label in (0, 1):
        exact = component(model, label)(x, t)
        for guided in (Classifier(model, model.log_class, 1.0, label=label), Conditioned(model, label)):
            found = guided(x, t)
            assert torch.allclose(found.eps, exact.eps, atol=1e-9), (label, guided)
            assert torch.allclose(found.x0, exact.x0, atol=1e-6, rtol=1e-8), (label, guided)


def component(model, k):
    """The class k of a mixture by itself."""
    return GaussianMixture(
        torch.ones(1, dtype=torch.float64), model.means[k, None], _covariances(model)[k, None], model.sde
    )


def _covariances(model):
    return (model.axes * model.variances[:, None]) @ model.axes.mT


def test_labels_of_each_sample_are_its_own():
    model = mixture(VP())
    x, t = noised(model)
    label = torch.tensor([0, 1, 1, 0, 1, 0])
    for make in (
        lambda k: Conditioned(model, k),
        lambda k: ClassifierFree(model, k, 2.5),
        lambda k: Classifier(model, model.log_class, 1.5, label=k),
    ):
        whole = make(label)(x, t)
        for i in range(6):
            alone = make(int(label[i]))(x[i : i + 1], t[i : i + 1])
            assert torch.allclose(whole.x0[i], alone.x0[0], atol=1e-12), i


def test_without_a_class_the_mixture_is_whole():
    model = mixture(VP())
    x, t = noised(model)
    none = torch.full((6,), 2)
    assert torch.equal(model(x, t, class_label=none).x0, model(x, t).x0)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "solver", [DDIM(steps=4), EulerMaruyama(steps=4), RePaint(DDIM(steps=4), rounds=2, jump=2)], ids=str
)
def test_samples_do_not_depend_on_the_batch(wrap, solver):
    model = wrap(mixture(VP()))
    whole = solver(model, shape=(5, 2), seed=7, dtype=torch.float64)
    parts = solver(model, shape=(5, 2), seed=7, dtype=torch.float64, batch_size=2)
    tail = solver(model, shape=(2, 2), seed=7, dtype=torch.float64, first=3)
    assert torch.allclose(whole.x, parts.x, atol=1e-9) and torch.allclose(whole.x[3:], tail.x, atol=1e-9)
    assert (whole.nfe, whole.backward) == (parts.nfe, parts.backward)


@pytest.mark.parametrize(
    "solver", [DDIM(steps=5), EulerMaruyama(steps=4), ProbabilityFlow(rtol=1e-3, atol=1e-3)], ids=str
)
def test_rows_go_with_the_numbers_of_the_samples(solver):
    model, seen = mixture(VP()), torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    wrapped = MMPS(Conditioned(model, torch.tensor([0, 1, 0, 1, 1])), Matrix(ROW), seen, 0.2)
    whole = solver(wrapped, shape=(5, 2), seed=2, dtype=torch.float64)
    for options in ({"batch_size": 2}, {"batch_size": 1}):
        parts = solver(wrapped, shape=(5, 2), seed=2, dtype=torch.float64, **options)
        assert torch.allclose(whole.x, parts.x, atol=1e-2), options
    tail = solver(wrapped, shape=(2, 2), seed=2, dtype=torch.float64, first=3)
    assert torch.allclose(whole.x[3:], tail.x, atol=1e-2)
    assert not torch.allclose(whole.x[:2], tail.x, atol=1e-2)


def test_likelihoods_take_the_rows_of_their_samples():
    model, label = mixture(VP()), torch.tensor([0, 1, 0, 1, 1])
    x = model.sample(5)
    whole = log_likelihood(Conditioned(model, label), x, Exact(), steps=20).log_prob
    parts = log_likelihood(Conditioned(model, label), x, Exact(), steps=20, batch_size=2).log_prob
    apart = torch.cat(
        [
            log_likelihood(Conditioned(model, int(k)), x[i : i + 1], Exact(), steps=20).log_prob
            for i, k in enumerate(label)
        ]
    )
    assert torch.allclose(whole, parts, atol=1e-10) and torch.allclose(whole, apart, atol=1e-10)


def test_a_number_of_rows_that_does_not_fit_is_refused():
    model = Conditioned(mixture(VP()), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"label has 3 rows.*found samples 0 to 3"):
        DDIM(steps=2)(model, shape=(4, 2))
    with pytest.raises(ValueError, match=r"Conditioned: label has 3 rows, found 2 samples"):
        model(torch.zeros(2, 2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))


def test_bound_models_can_be_bound_again_and_leave_the_first_as_it_is():
    model = Conditioned(mixture(VP()), torch.arange(6) % 2)
    assert isinstance(model, PerSample)
    twin = of_samples(model, Noise(0, 2), 4)
    again = of_samples(twin, Noise(0, 4), 2)
    assert torch.equal(again.label, model.label[4:]) and len(model.label) == 6
    assert again.model is model.model
    plain = mixture(VP())
    assert of_samples(plain, Noise(0, 2), 4) is plain


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (3, r"in 0 \.\. 2, found 3"),
        (-1, r"in 0 \.\. 2, found -1"),
        (torch.tensor([0, 5]), r"in 0 \.\. 2, found 5"),
        (1.5, r"integers; found 1\.5"),
        (True, "integers; found True"),
        (torch.zeros(2, 2).long(), r"integers; found torch\.int64 of shape \(2, 2\)"),
    ],
)
def test_labels_that_cannot_be_are_refused(label, words):
    for make in (lambda k: Conditioned(network(), k), lambda k: ClassifierFree(network(), k, 2.0)):
        with pytest.raises(ValueError, match=words):
            make(label)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="knows no classes"):
        Conditioned(network(classes=0), 1)
    with pytest.raises(ValueError, match="found neither"):
        Conditioned(network())
    with pytest.raises(ValueError, match="one process"):
        Blend(mixture(VP()), mixture(VE()), 2.0)
    for scale in (float("nan"), float("inf"), "2", None, True):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            ClassifierFree(network(), 1, scale)
    x, t = torch.zeros(3, 2), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"Classifier: log_prob must give .*\(B,\).* found \(3, 2\) for 3 samples"):
        Classifier(network(), lambda x, t: x)(x, t)
    with pytest.raises(ValueError, match=r"more than 4 classes, found \(3, 2\)"):
        Classifier(network(), lambda x, t: x, label=4)(x, t)
    with pytest.raises(ValueError, match=r"a number for each sample, \(3,\), found \(3, 2\)"):
        Guided(network(), lambda x0: x0)(x, t)


def test_a_network_knows_how_many_classes_it_has():
    assert (network().classes, network(classes=0).classes, mixture(VP()).classes) == (3, 0, 2)
    assert network().under(VE(sigma_min=0.05)).classes == 3
    foreign = ScoreNetwork(torch.nn.Identity(), VP())
    assert foreign.classes is None and Conditioned(foreign, 7).label.tolist() == [7]


def test_a_noisy_classifier_guides():
    model = mixture(VP())
    classifier = NoisyClassifier(torch.nn.Sequential(), VP())
    assert callable(classifier.log_prob)
    out = DDIM(steps=5)(Classifier(model, model.log_class, 1.0, label=1), shape=(4, 2), dtype=torch.float64)
    assert (out.nfe, out.backward) == (5, 0)  # nothing goes back through the model itself


@pytest.mark.parametrize(
    ("wrap", "backward"), [("DPS", 1), ("PiGDM", 1), ("MMPS", 2), ("guided", 1), ("conditioned", 0)]
)
def test_passes_back_are_counted(wrap, backward):
    out = DDIM(steps=3)(WRAPPERS[wrap](mixture(VP())), shape=(4, 2), dtype=torch.float64)
    assert (out.nfe, out.backward) == (3, 3 * backward)


# ---------------------------------------------------------------------------------------------------------------------
# Linear posteriors and replacement, point by point.


def well_posed(x, t, sde):
    """Without the last time of a process that is singular there: just before it x_0 is known to 1e-3 alone."""
    return (x[:-1], t[:-1]) if isinstance(sde, RectifiedFlow) else (x, t)


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
@pytest.mark.parametrize("noise_std", [0.0, 0.05, 0.5])
def test_moment_matching_is_exact_for_gaussians(sde, noise_std):
    model, matrix = correlated(sde), torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    seen = torch.tensor([0.2, -1.0], dtype=torch.float64)
    exact = model.given(matrix, seen, max(noise_std, 1e-9))
    x, t = well_posed(*noised(model), sde)
    found, true = MMPS(model, Matrix(matrix), seen, noise_std, iterations=2)(x, t), exact(x, t)
    assert torch.allclose(found.x0, true.x0, atol=1e-6), (found.x0 - true.x0).abs().max()
    few = MMPS(model, Matrix(matrix), seen, noise_std, iterations=1)(x, t)
    assert (few.x0 - true.x0).abs().max() > 1e-5  # two values take two iterations


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_pigdm_is_exact_for_isotropic_gaussians_of_its_deviation(sde):
    isotropic = GaussianMixture(
        torch.ones(1, dtype=torch.float64), CENTRE[None], 0.49 * torch.eye(2, dtype=torch.float64)[None], sde
    )
    x, t = well_posed(*noised(isotropic), sde)
    true = isotropic.given(ROW, SEEN, 0.1)(x, t)
    assert torch.allclose(PiGDM(isotropic, Matrix(ROW), SEEN, 0.1, data_std=0.7)(x, t).x0, true.x0, atol=1e-8)
    assert (PiGDM(isotropic, Matrix(ROW), SEEN, 0.1)(x, t).x0 - true.x0).abs().max() > 1e-5


@pytest.mark.parametrize("sde", [VP(), VE(), RectifiedFlow()], ids=str)
def test_dps_is_guidance_by_the_gaussian_likelihood(sde):
    model = mixture(sde)
    x, t = noised(model)

    def log_likelihood(x0):
        return -0.5 * (SEEN - x0 @ ROW.mT).square().sum(1) / 0.3**2

    a, b = DPS(model, Matrix(ROW), SEEN, 0.3)(x, t), Guided(model, log_likelihood)(x, t)
    assert torch.allclose(a.x0, b.x0, atol=1e-9) and torch.allclose(a.eps, b.eps, atol=1e-9)


def test_at_the_data_all_three_are_bayes_rule():
    model, t = mixture(VP()), torch.tensor(1e-5, dtype=torch.float64)
    x = model.sample(4)
    exact = (model.score(x, t) + (SEEN - x @ ROW.mT) @ ROW / 0.4**2).numpy()
    for kind in (DPS, PiGDM, MMPS):
        found = kind(model, Matrix(ROW), SEEN, 0.4).score(x, t).numpy()
        assert found == pytest.approx(exact, rel=2e-3, abs=2e-2), kind


def test_directions_that_no_covariance_has_are_left_alone():
    """M = s^2 I + C: where C is negative, without a stop the step would be as large as p^T M p is small."""
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    matrix = torch.diag(torch.tensor([2.0, -0.0999, 1.0], dtype=torch.float64))  # C of positive, negative, positive
    variance = torch.tensor(0.1, dtype=torch.float64)
    u, product = conjugate_gradients(lambda p: (variance * p + p @ matrix, p @ matrix), target, 3, variance)
    exact = torch.tensor([[1 / 2.1, 0.0, 0.0], [0.0, 0.0, 0.0], [1 / 2.1, 0.0, 1 / 1.1]], dtype=torch.float64)
    assert torch.allclose(u, exact, atol=1e-12) and torch.allclose(product, exact @ matrix, atol=1e-12)


def test_noise_of_each_value_of_the_observation():
    model, matrix = correlated(VP()), torch.eye(2, dtype=torch.float64)
    seen, noise = torch.tensor([0.2, -1.0], dtype=torch.float64), torch.tensor([0.1, 0.5], dtype=torch.float64)
    x, t = noised(model)
    whitened = model.given(matrix / noise[:, None], seen / noise, 1.0)(x, t)
    found = MMPS(model, Matrix(matrix), seen, noise, iterations=2)(x, t)
    assert torch.allclose(found.x0, whitened.x0, atol=1e-8)


@pytest.mark.parametrize("kind", [DPS, PiGDM, MMPS])
def test_observations_that_cannot_be_are_refused(kind):
    model, operator = mixture(VP()), Mask(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"observation: expected finite numbers of shape \(2\) or \(N, 2\)"):
        kind(model, operator, torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="expected finite numbers"):
        kind(model, operator, torch.tensor([0.0, float("nan")]), 0.1)
    for noise_std in (-0.1, float("nan"), torch.ones(3)):
        with pytest.raises(ValueError, match="noise_std must be"):
            kind(model, operator, torch.zeros(2), noise_std)
    with pytest.raises(TypeError, match="must be a LinearOperator"):
        kind(model, lambda x: x, torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match=r"the operator is for \(2,\), found samples of \(4,\)"):
        kind(model, operator, torch.zeros(2), 0.1)(torch.zeros(3, 4), torch.tensor(0.5))


def test_dps_needs_noise_and_the_others_do_not():
    model, operator = mixture(VP()), Mask(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"noise_std must be positive.*without noise take PiGDM or MMPS"):
        DPS(model, operator, torch.zeros(2), 0.0)
    for kind in (PiGDM, MMPS):
        out = Heun(steps=20)(kind(model, operator, KNOWN, 0.0), shape=(8, 2), dtype=torch.float64)
        assert (out.x[:, 0] - 1).abs().max() < 0.02, kind


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("solver", [DDIM(steps=20), Ancestral(steps=50), Heun(steps=10)], ids=str)
def test_replacement_ends_at_what_is_known(solver, fresh):
    model = mixture(VP())
    known = torch.tensor([[0.5, 9.0], [-0.5, 9.0], [1.5, 9.0]], dtype=torch.float64)
    out = solver(Replacement(model, known, torch.tensor([1, 0]), fresh), shape=(3, 2), dtype=torch.float64)
    assert (out.x[:, 0] - known[:, 0]).abs().max() < 0.02
    assert (out.x[:, 1] < 5).all()  # the hidden value plays no part


def test_the_known_part_is_noised_afresh_at_each_time_and_for_each_sample():
    class Seen(GaussianMixture):
        def _components(self, x, t):
            states.append(x)
            return super()._components(x, t)

    states = []
    base = mixture(VP())
    model = Seen(base.log_weights.exp(), base.means, _covariances(base), VP())
    n = 4000
    replaced = of_samples(Replacement(model, KNOWN, torch.tensor([1, 0])), Noise(5), n)
    moments = [VP().alpha(torch.tensor(0.4)).item(), VP().sigma(torch.tensor(0.4)).item()]
    x = torch.randn(n, 2, dtype=torch.float64)
    for t in (0.4, 0.4, 0.41):
        replaced(x, torch.tensor(t, dtype=torch.float64))
    first, again, later = (state[:, 0] for state in states)
    assert torch.equal(first, again) and torch.equal(states[0][:, 1], x[:, 1])
    assert first.mean() == pytest.approx(moments[0], abs=0.05) and first.std() == pytest.approx(moments[1], abs=0.05)
    assert abs(torch.corrcoef(torch.stack((first, later)))[0, 1]) < 0.06
    other = of_samples(replaced, Noise(6), n)
    other(x, torch.tensor(0.4, dtype=torch.float64))
    assert abs(torch.corrcoef(torch.stack((first, states[-1][:, 0])))[0, 1]) < 0.06


def test_times_of_each_sample_draw_their_own_noise():
    model = Replacement(mixture(VP()), KNOWN, torch.tensor([1, 0]))
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.2], dtype=torch.float64)
    whole = model(x, t)
    for value in (0.2, 0.5):
        same = model(x, torch.tensor(value, dtype=torch.float64))
        for i in (t == value).nonzero().flatten().tolist():
            assert torch.allclose(whole.x0[i], same.x0[i], atol=1e-12), i
    assert torch.isfinite(AdaptiveSDE(rtol=0.2, atol=0.2)(ClassifierFree(mixture(VP()), 1, 2.0), shape=(3, 2)).x).all()


def test_masks_that_cannot_be_are_refused():
    model = mixture(VP())
    for mask in (torch.tensor([0.5, 1.0]), torch.zeros(2)):
        with pytest.raises(ValueError, match="mask must be 1 where known"):
            Replacement(model, KNOWN, mask)
    with pytest.raises(ValueError, match=r"known: expected the shape of the mask, \(2\), or \(N, 2\), found \(3,\)"):
        Replacement(model, torch.zeros(3), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"the mask is of shape \(2,\), found samples"):
        Replacement(model, KNOWN, torch.tensor([1, 0]))(torch.zeros(1, 3), torch.tensor(0.5))
    with pytest.raises(ValueError, match="must be orthogonal"):
        Rotated(model, 2 * TURN)
    with pytest.raises(ValueError, match="expected one channel"):
        colorization(model, torch.zeros(3, 4, 4))


@pytest.mark.parametrize("sde", SOME_SDES, ids=str)
def test_a_rotated_model_is_that_of_rotated_data(sde):
    model = correlated(sde)
    turned = GaussianMixture(
        torch.ones(1, dtype=torch.float64), (TURN @ CENTRE)[None], (TURN @ CORRELATED @ TURN.mT)[None], sde
    )
    x, t = noised(turned)
    found, exact = Rotated(model, TURN)(x, t), turned(x, t)
    assert torch.allclose(found.x0, exact.x0, atol=1e-9) and torch.allclose(found.eps, exact.eps, atol=1e-9)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.299, 0.587, 0.114]), torch.tensor([0.0, 1.0, 0.0])])
def test_colors_have_the_grey_that_was_given(weights):
    d = 12
    half = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = half @ half.mT / d + 0.05 * torch.eye(d, dtype=torch.float64)
    model = GaussianMixture(
        torch.ones(1, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64), covariance[None], VP()
    )
    grey = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    out = DDIM(steps=20)(colorization(model, grey, weights), shape=(2, 3, 2, 2), dtype=torch.float64).x
    share = torch.full((3,), 1 / 3) if weights is None else weights
    assert torch.allclose(torch.einsum("c,bchw->bhw", share.double(), out), grey[:, 0], atol=0.02)
    assert out.std(1).min() > 1e-3  # and is not grey itself


# ---------------------------------------------------------------------------------------------------------------------
# The mixture's own posteriors.


def test_the_mixture_given_an_observation_is_bayes_rule():
    model, noise_std = mixture(VP()), 0.4
    exact = model.given(ROW, SEEN, noise_std)
    x = model.sample(50)
    joint = model.log_prob(x) - 0.5 * ((SEEN - x @ ROW.mT) / noise_std).square().sum(1)
    difference = exact.log_prob(x) - joint
    assert (difference - difference[0]).abs().max() < 1e-10


def test_the_classes_of_noisy_points_are_bayes_rule():
    model = mixture(VE())
    x, t = noised(model)
    parts = [component(model, k) for k in (0, 1)]
    joint = torch.stack([part.log_prob(x, t) for part in parts], 1) + model.log_weights
    assert torch.allclose(model.log_class(x, t), joint.log_softmax(1), atol=1e-9)
