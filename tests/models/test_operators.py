"""Linear operators: the adjoint's identity, matrices written by hand, streams of noise, refusals."""

import itertools
import math

import pytest
import torch
from torch import nn

from experiments.build import build
from models import (
    Blur,
    Composition,
    Downsampling,
    Grayscale,
    Linear,
    LinearOperator,
    Mask,
    Matrix,
    RandomProjection,
    box_mask,
    half_mask,
    random_mask,
)
from sde import Noise
from solvers.probes import gaussian

SHAPES = [(6,), (2, 12), (1, 8, 8), (3, 4, 6), (2, 4, 6, 2)]
MOTION = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.1], [0.0, 0.05, 0.0], [0.0, 0.0, 0.0]])


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cumulated(x):
    """Sums along the last axis, times a ramp: far from symmetric."""
    return x.cumsum(-1) * torch.arange(1, x.shape[-1] + 1, device=x.device)


def operators(shape):
    """One of each kind, or more, for data of ``shape``."""
    size, axes = math.prod(shape), max(len(shape) - 1, 1)
    kernel = MOTION[:, :2].sum(1) if axes == 1 else MOTION if axes == 2 else MOTION[..., None]
    yield Mask(draw(shape) > 0)
    yield random_mask(shape, 0.4, seed=1)
    yield box_mask(shape, 1)
    yield half_mask(shape)
    yield Blur(shape, 0.7)
    yield Blur(shape, 2.0, radius=5)
    yield Blur(shape, kernel=kernel)
    yield Downsampling(shape, 2)
    yield RandomProjection(shape, size - 2, seed=3)
    yield Matrix(draw((3, size)), shape)
    yield Linear(cumulated, shape)
    yield Linear(lambda x: x.flatten(1)[:, 1:3] - 2 * x.flatten(1)[:, :2], shape)
    yield Composition(Downsampling(shape, 2), Blur(shape, kernel=kernel))
    yield Composition(Matrix(draw((2, 5))), Composition(RandomProjection(shape, 5), half_mask(shape)))
    if len(shape) > 1 and shape[0] > 1:
        yield Grayscale(shape)
        yield Grayscale(shape, range(2, 2 + shape[0]))


def every_operator():
    return (operator for shape in SHAPES for operator in operators(shape))


def dense(operator):
    """The matrix of an operator, column by column."""
    size = math.prod(operator.shape)
    return operator(torch.eye(size, dtype=torch.float64).reshape(size, *operator.shape)).flatten(1).mT


# The identity of the adjoint


def test_the_adjoint_moves_to_the_other_side_of_the_product():
    for operator in every_operator():
        x, y = draw((3, *operator.shape), 1), draw((3, *operator.observed), 2)
        left = (operator(x) * y).flatten(1).sum(1)
        right = (x * operator.adjoint(y)).flatten(1).sum(1)
        scale = operator(x).flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
        assert (left - right).abs().max() <= 1e-12 * scale.max(), operator
        assert left.abs().max() > 1e-3, operator


def test_the_derivative_is_the_operator_and_its_transpose_the_adjoint():
    for operator in every_operator():
        x, y = draw((2, *operator.shape), 1), draw((2, *operator.observed), 2)
        value, transpose = torch.func.vjp(operator, x)
        torch.testing.assert_close(transpose(y)[0], operator.adjoint(y), rtol=1e-12, atol=1e-12, msg=str(operator))
        torch.testing.assert_close(value, operator(x), rtol=0, atol=0)
        _, transpose = torch.func.vjp(operator.adjoint, y)
        torch.testing.assert_close(transpose(x)[0], operator(x), rtol=1e-12, atol=1e-12, msg=str(operator))


def test_operators_run_under_vmap_without_and_with_gradients():
    for operator in every_operator():
        x, y = draw((2, 3, *operator.shape), 1), draw((2, 3, *operator.observed), 2)
        for call, value in ((operator, x), (operator.adjoint, y)):
            each = torch.stack([call(part) for part in value])
            torch.testing.assert_close(torch.vmap(call)(value), each, rtol=1e-12, atol=1e-12, msg=str(operator))
        rows = torch.vmap(lambda v, a=operator, at=x[0]: torch.func.vjp(a, at)[1](v)[0])(y)
        each = torch.stack([operator.adjoint(part) for part in y])
        torch.testing.assert_close(rows, each, rtol=1e-12, atol=1e-12, msg=str(operator))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_operators_run_where_samplers_run(guard):
    operator = Linear(cumulated, (2, 4))
    y = draw((2, 2, 4))
    expected = operator.adjoint(y)
    with guard():
        assert torch.equal(operator.adjoint(y.clone()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_of_the_data_is_kept_and_used(dtype):
    for operator in every_operator():
        x, y = draw((2, *operator.shape)), draw((2, *operator.observed))
        found, back = operator(x.to(dtype)), operator.adjoint(y.to(dtype))
        assert found.dtype == back.dtype == dtype, operator
        tolerance = dict(rtol=50 * torch.finfo(dtype).eps, atol=50 * torch.finfo(dtype).eps)
        torch.testing.assert_close(found.double(), operator(x), **tolerance, msg=str(operator))
        torch.testing.assert_close(back.double(), operator.adjoint(y), **tolerance, msg=str(operator))


def test_operators_follow_their_input_to_its_device():
    """Tensors of shapes alone stand for a device here: mixed with those of another they raise errors."""
    for operator in every_operator():
        x, y = torch.empty(2, *operator.shape, device="meta"), torch.empty(2, *operator.observed, device="meta")
        assert operator(x).device == operator.adjoint(y).device == x.device, operator


@pytest.mark.gpu
def test_operators_are_the_same_on_a_cuda_device():
    for operator in every_operator():
        x, y = draw((2, *operator.shape)), draw((2, *operator.observed))
        for call, value in ((operator, x), (operator.adjoint, y), (lambda v, a=operator: a.simulate(v, 0.5), x)):
            found = call(value.cuda()).cpu()
            torch.testing.assert_close(found, call(value), rtol=1e-12, atol=1e-12, msg=str(operator))


def test_autocast_leaves_the_precision_alone():
    for operator in every_operator():
        x, y = draw((2, *operator.shape)).float(), draw((2, *operator.observed)).float()
        expected = operator(x), operator.adjoint(y)
        with torch.autocast("cpu", torch.bfloat16):
            found = operator(x), operator.adjoint(y)
        assert all(map(torch.equal, found, expected)), operator


def test_each_sample_is_observed_on_its_own():
    for operator in every_operator():
        x, y = draw((3, *operator.shape)), draw((3, *operator.observed))
        other_x, other_y = x.clone(), y.clone()
        other_x[1:], other_y[1:] = 7.0, 7.0
        for call, a, b in ((operator, x, other_x), (operator.adjoint, y, other_y)):
            torch.testing.assert_close(call(a)[0], call(b)[0], rtol=1e-12, atol=1e-12, msg=str(operator))
            torch.testing.assert_close(call(a[:1])[0], call(a)[0], rtol=1e-12, atol=1e-12, msg=str(operator))
            assert call(a[:0]).shape == (0, *call(a).shape[1:]), operator


def test_shapes_are_those_stated_and_said():
    for operator in every_operator():
        assert operator(draw((2, *operator.shape))).shape == (2, *operator.observed), operator
        assert operator.adjoint(draw((2, *operator.observed))).shape == (2, *operator.shape), operator
        assert f"{operator.shape} -> {operator.observed}" in repr(operator)
    assert repr(Downsampling((1, 4, 4), 2)) == "Downsampling((1, 4, 4) -> (1, 2, 2), factor=2)"


def test_no_tensor_of_an_operator_goes_into_a_checkpoint():
    for operator in every_operator():
        assert not operator.state_dict() and not list(operator.parameters()), operator


# Against matrices written by hand


def test_masks_keep_what_is_known():
    mask = torch.tensor([1, 0, 1])
    assert torch.equal(dense(Mask(mask)), torch.diag(mask).double())
    x = torch.tensor([[1.0, math.nan, 3.0]])
    assert Mask(mask)(x).tolist() == [[1.0, 0.0, 3.0]]
    wide = Mask(torch.tensor([[True, False]]), shape=(3, 2, 2))
    assert torch.equal(wide(torch.ones(1, 3, 2, 2))[0, 2], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert torch.equal(Mask(torch.ones(2, 2))(x := draw((1, 2, 2))), x)


def test_a_mask_is_a_copy():
    mask = torch.tensor([True, False])
    operator = Mask(mask)
    mask[1] = True
    assert operator.mask.tolist() == [True, False]


def by_hand(kernel, shape):
    """Convolution with zeros beyond the borders: out[i] = sum_j kernel[j] x[i - j + centre], on one channel."""
    grid = list(itertools.product(*map(range, shape)))
    centre = [n // 2 for n in kernel.shape]
    matrix = torch.zeros(len(grid), len(grid), dtype=torch.float64)
    for (row, i), (column, j) in itertools.product(enumerate(grid), enumerate(grid)):
        at = tuple(a - b + c for a, b, c in zip(i, j, centre, strict=True))
        if all(0 <= k < n for k, n in zip(at, kernel.shape, strict=True)):
            matrix[row, column] = kernel[at]
    return matrix


@pytest.mark.parametrize(
    "shape, kernel",
    [
        ((5,), torch.tensor([0.5, 0.3, 0.2])),
        ((2, 5), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])),
        ((2, 3, 4), MOTION),
        ((1, 3, 2, 3), draw((3, 1, 5))),
    ],
)
def test_blur_is_the_convolution_written_out(shape, kernel):
    grid = shape[1:] or shape
    channels = torch.eye(math.prod(shape) // math.prod(grid), dtype=torch.float64)
    expected = torch.kron(channels, by_hand(kernel.double(), grid))
    operator = Blur(shape, kernel=kernel)
    torch.testing.assert_close(dense(operator), expected, rtol=1e-14, atol=1e-14)
    transposed = operator.adjoint(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)).flatten(1)
    torch.testing.assert_close(transposed, expected, rtol=1e-14, atol=1e-14)


def test_a_single_bright_place_becomes_the_kernel():
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1
    seen = Blur((1, 9, 9), kernel=MOTION)(image)[0, 0]
    torch.testing.assert_close(seen[2:7, 3:6], MOTION)
    assert seen.sum() == pytest.approx(float(MOTION.sum()))


@pytest.mark.parametrize("std", [0.4, 1.0, 2.5])
def test_a_gaussian_blur_is_a_gaussian_of_this_width(std):
    radius = math.ceil(4 * std)
    kernel = Blur((1, 8, 8), std).kernel
    assert kernel.shape == (2 * radius + 1, 2 * radius + 1)
    r = torch.arange(-radius, radius + 1, dtype=torch.float64)
    expected = torch.exp(-(r[:, None] ** 2 + r**2) / (2 * std**2))
    torch.testing.assert_close(kernel, expected / expected.sum(), rtol=1e-12, atol=1e-300)
    assert Blur((1, 8, 8), std, radius=2).kernel.shape == (5, 5)


def test_downsampling_is_the_mean_of_blocks():
    expected = torch.zeros(2, 8, dtype=torch.float64)  # of (1, 2, 4): the left and the right block of 2x2
    expected[0, [0, 1, 4, 5]] = expected[1, [2, 3, 6, 7]] = 0.25
    assert torch.equal(dense(Downsampling((1, 2, 4), 2)), expected)
    for shape in SHAPES:
        matrix = dense(Downsampling(shape, 2))
        each = 2.0 ** -max(len(shape) - 1, 1)
        torch.testing.assert_close(matrix @ matrix.mT, each * torch.eye(len(matrix), dtype=torch.float64))
    assert torch.equal(dense(Downsampling((2, 3), 1)), torch.eye(6, dtype=torch.float64))


def test_grayscale_is_the_luma_or_the_mean():
    eye = torch.eye(2, dtype=torch.float64)
    luma = torch.cat((0.299 * eye, 0.587 * eye, 0.114 * eye), dim=1)
    torch.testing.assert_close(dense(Grayscale((3, 1, 2))), luma, rtol=1e-15, atol=0)
    torch.testing.assert_close(dense(Grayscale((2, 2))), torch.cat((eye, eye), dim=1) / 2, rtol=1e-15, atol=0)
    expected = torch.cat((2 * eye, 0 * eye, -eye), dim=1)
    assert torch.equal(dense(Grayscale((3, 2), weights=(2, 0, -1))), expected)


def test_a_matrix_acts_on_values_in_their_order():
    matrix = draw((3, 12))
    assert torch.equal(dense(Matrix(matrix, (2, 3, 2))), matrix)
    assert torch.equal(Matrix(matrix).adjoint(torch.eye(3, dtype=torch.float64)), matrix)
    assert Matrix([[1, 2]]).shape == (2,)
    operator = Matrix(matrix)
    matrix.zero_()
    assert operator.matrix.any()


@pytest.mark.parametrize("shape, rows", [((5,), 5), ((3, 4, 5), 17), ((1, 8, 8), 1)])
def test_random_directions_are_orthonormal(shape, rows):
    q = dense(RandomProjection(shape, rows, seed=5))
    torch.testing.assert_close(q @ q.mT, torch.eye(rows, dtype=torch.float64), rtol=0, atol=1e-13)


def test_random_directions_are_uniform():
    """Over all rotations an entry of a 3x3 Q has the mean 0, the variance 1/3 and the kurtosis 9/5."""
    q = torch.stack([RandomProjection((3,), 3, seed).matrix for seed in range(1500)])
    assert q.mean(0).abs().max() < 4.5 / math.sqrt(3 * 1500)
    assert (q.square().mean(0) - 1 / 3).abs().max() < 4.5 * math.sqrt((1 / 5 - 1 / 9) / 1500)


def test_a_linear_function_is_the_operator_that_it_states():
    matrix, image = draw((3, 12), dtype=torch.float32), (1, 3, 4)
    stated = Linear(lambda x: x.flatten(1) @ matrix.to(x).mT, image)
    assert stated.observed == (3,) and torch.equal(dense(stated), matrix.double())
    convolution = Linear(nn.Conv2d(1, 2, 3, stride=2, bias=False), image)
    assert convolution.observed == (2, 1, 1)
    x, y = draw((2, *image)).float(), draw((2, 2, 1, 1)).float()
    with torch.no_grad():
        left, right = (convolution(x) * y).sum(), (x * convolution.adjoint(y)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-5)


def test_a_composition_is_the_product_of_the_matrices():
    inner, outer = Blur((1, 4, 4), kernel=MOTION), Downsampling((1, 4, 4), 2)
    torch.testing.assert_close(dense(Composition(outer, inner)), dense(outer) @ dense(inner))


# Masks


def test_masks_of_images_hide_what_they_say():
    assert box_mask((3, 4, 5), 2).mask.sum() == 3 * (20 - 4)
    assert box_mask((1, 4, 5), (2, 3)).mask[0].int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 1, 1, 1],
    ]
    assert box_mask((5,), 3).mask.int().tolist() == [1, 0, 0, 0, 1]
    halves = {side: half_mask((2, 2, 3), side).mask.int().tolist() for side in ("left", "right", "top", "bottom")}
    assert halves == {
        "left": [[[1, 0, 0], [1, 0, 0]]] * 2,
        "right": [[[0, 0, 1], [0, 0, 1]]] * 2,
        "top": [[[1, 1, 1], [0, 0, 0]]] * 2,
        "bottom": [[[0, 0, 0], [1, 1, 1]]] * 2,
    }


def test_random_masks_know_their_share_in_all_channels():
    mask = random_mask((3, 8, 8), 0.25, seed=4).mask
    assert mask[0].sum() == 16 and torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2])
    assert torch.equal(random_mask((3, 8, 8), 0.25, seed=4).mask, mask)
    assert not torch.equal(random_mask((3, 8, 8), 0.25, seed=5).mask, mask)
    assert random_mask((10,), 1.0).mask.all() and random_mask((10,), 0.29).mask.sum() == 3
    often = torch.stack([random_mask((10,), 0.3, seed).mask for seed in range(800)]).double().mean(0)
    assert (often - 0.3).abs().max() < 4.5 * math.sqrt(0.21 / 800)


# Observations


def test_an_observation_is_the_operator_plus_noise_of_this_size():
    operator = Downsampling((1, 8, 8), 2)
    x = draw((500, 1, 8, 8))
    assert torch.equal(operator.simulate(x, 0.0), operator(x))
    noise = (operator.simulate(x, 0.3, seed=1) - operator(x)) / 0.3
    assert abs(float(noise.mean())) < 4.5 / math.sqrt(8000)
    assert abs(float(noise.square().mean()) - 1) < 4.5 * math.sqrt(2 / 8000)
    assert operator.simulate(x.float(), 0.3).dtype == torch.float32


def test_the_noise_of_a_sample_depends_on_the_seed_and_its_number_alone():
    operator = Blur((2, 6), 1.0)
    x = draw((5, 2, 6))
    whole = operator.simulate(x, 0.5, seed=3)
    assert torch.equal(operator.simulate(x[:2], 0.5, seed=3), whole[:2])
    assert torch.equal(operator.simulate(x[2:], 0.5, seed=3, first=2), whole[2:])
    assert not torch.equal(operator.simulate(x, 0.5, seed=4), whole)
    same = operator.simulate(x[:1].expand_as(x), 0.5, seed=3)
    assert len(same.unique(dim=0)) == 5


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_seeds_shared_with_samplers_give_other_numbers(seed):
    """With the same seed, the noise of an observation must not be that of the prior, of a step or of a probe."""
    x = torch.zeros(4, 8, dtype=torch.float64)
    noise = Mask(torch.ones(8)).simulate(x, 1.0, seed)
    others = [Noise(seed).normal((4, 8), draw, dtype=torch.float64) for draw in (*range(64), 2**24, 2**30, 3 * 2**30)]
    others += [gaussian(Noise(seed), 2, x).unbind(0)[i] for i in range(2)]
    assert all((noise - other).abs().min() > 1e-6 for other in others)
    rows = Noise(seed).normal((4, 8), 0, dtype=torch.float64)
    drawn = RandomProjection((8,), 1, seed).matrix[0]
    assert abs(float(drawn @ rows[0] / rows[0].norm())) < 0.99


# Refusals


def test_a_shape_of_the_data_that_is_not_the_operators_is_refused():
    for operator in every_operator():
        for call, shape, name in ((operator, operator.shape, "x"), (operator.adjoint, operator.observed, "y")):
            for wrong in (shape, (2, *shape, 1), (2, shape[0] + 1, *shape[1:])):
                with pytest.raises(ValueError, match=rf"expected {name} of shape \(B, {shape[0]}.*found.*\[None\]"):
                    call(draw(wrong))
    with pytest.raises(ValueError, match=r"Blur expected x of a floating type, found torch.uint8; map it"):
        Blur((1, 4, 4), 1.0)(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(), (0, 2), (2.0,), (-1, 4)])
def test_a_shape_that_is_none_is_refused(shape):
    for make in (lambda s: Blur(s, 1.0), lambda s: Downsampling(s, 2), lambda s: RandomProjection(s, 1), half_mask):
        with pytest.raises(ValueError, match="expected the shape of one sample"):
            make(shape)


BAD = [
    (lambda: Mask(torch.tensor([0.0, 0.5, 1.0])), "1 .known. and 0 .hidden. alone, found 0.5; say mask > 0.5"),
    (lambda: Mask(torch.tensor([1.0, math.nan])), "found nan"),
    (lambda: Mask(torch.zeros(4)), "something known .1., found all hidden .0."),
    (lambda: Mask(torch.ones(3, 2), shape=(1, 2, 2)), r"broadcasts to the shape \(1, 2, 2\).*found \(3, 2\)"),
    (lambda: Mask(torch.ones(2, 1, 2), shape=(1, 2, 2)), r"found \(2, 1, 2\); leave axes out"),
    (lambda: Mask(torch.ones(1, 2, 2), shape=(2, 2)), r"found \(1, 2, 2\)"),
    (lambda: Blur((1, 4, 4), 0.0), "std must be positive and finite, in places, found 0.0"),
    (lambda: Blur((1, 4, 4), math.nan), "std must be positive"),
    (lambda: Blur((1, 4, 4), 1.0, radius=0), "radius must be a number of places, at least 1, found 0"),
    (lambda: Blur((1, 4, 4), 1.0, radius=1.5), "radius must be"),
    (lambda: Blur((1, 4, 4)), "either std, .*or kernel, found std=None, radius=None and no kernel"),
    (lambda: Blur((1, 4, 4), 1.0, kernel=MOTION), "found std=1.0, radius=None and a kernel; leave out"),
    (lambda: Blur((1, 4, 4), radius=1, kernel=MOTION), "found std=None, radius=1 and a kernel"),
    (lambda: Blur((1, 4, 4), kernel=torch.ones(2, 3)), r"2 axes of odd sizes.*found \(2, 3\); pad"),
    (lambda: Blur((1, 4), kernel=MOTION), r"1 axes of odd sizes.*found \(5, 3\)"),
    (lambda: Blur((1, 4), kernel=torch.tensor([1.0, math.inf, 0.0])), "kernel must hold finite numbers, found inf"),
    (lambda: Blur((1, 2, 2, 2, 2), 1.0), "1 to 3 axes of places, found 4"),
    (lambda: Downsampling((1, 6, 8), 4), "divides 6 and 8.*found 4; take another, or crop"),
    (lambda: Downsampling((1, 8, 8), 0), "found 0"),
    (lambda: Grayscale((1, 4, 4)), r"2 channels or more, found the shape \(1, 4, 4\)"),
    (lambda: Grayscale((4,)), r"found the shape \(4,\)"),
    (lambda: Grayscale((3, 4), weights=(1.0, 2.0)), r"expected 3 weights.*found \[1.0, 2.0\]"),
    (lambda: Grayscale((2, 4), weights=(0.0, 0.0)), "not all 0"),
    (lambda: RandomProjection((1, 2, 2), 5), "integer from 1 to 4, the number of values of x, found 5"),
    (lambda: RandomProjection((4,), 0), "found 0"),
    (lambda: RandomProjection((4,), 2, seed=-1), "seed must be an integer"),
    (lambda: Matrix(torch.ones(4)), r"found \(4,\)"),
    (lambda: Matrix(torch.ones(4, 2), (1, 2, 2)), r"D = 4 values of x, found \(4, 2\).*transposed"),
    (lambda: Matrix(torch.tensor([[math.nan]])), "matrix must hold finite numbers, found nan"),
    (lambda: Matrix(torch.ones(0, 2)), r"found \(0, 2\)"),
    (
        lambda: Composition(Downsampling((1, 8, 8), 2), Downsampling((1, 8, 8), 2)),
        r"expected an outer operator on \(1, 4, 4\).*found Downsampling on \(1, 8, 8\); build it with shape",
    ),
    (lambda: Blur((2,), 1.0).simulate(torch.zeros(1, 2), -0.1), "noise_std must be at least 0 and finite, found -0.1"),
    (lambda: Blur((2,), 1.0).simulate(torch.zeros(1, 2), math.nan), "noise_std must be"),
    (lambda: box_mask((1, 4, 4), 0), r"hidden box from 1 to \(4, 4\), the axes of places, found \(0, 0\)"),
    (lambda: box_mask((1, 4, 4), 5), r"found \(5, 5\)"),
    (lambda: box_mask((1, 4, 4), (1, 1, 1)), r"found \(1, 1, 1\)"),
    (lambda: box_mask((1, 4, 4), 4), "something known"),
    (lambda: half_mask((1, 4, 4), "middle"), "side must be one of left, right, top, bottom .*found 'middle'"),
    (lambda: half_mask((1, 4), "top"), "side must be one of left, right for data"),
    (lambda: random_mask((1, 4, 4), 0.0), "above 0 and at most 1, found 0.0"),
    (lambda: random_mask((1, 4, 4), 1.1), "found 1.1"),
    (lambda: random_mask((1, 4, 4), 0.01), "something known"),
]


@pytest.mark.parametrize("make, words", BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_only_operators_are_composed():
    with pytest.raises(TypeError, match="expected a LinearOperator, found function; wrap a function in Linear"):
        Composition(Blur((2,), 1.0), lambda x: x)


GUIDED = "for a nonlinear observation"
NOT_LINEAR = [
    (lambda x: x**2, GUIDED),
    (lambda x: x + 1, r"found f\(0\) = 1; take f\(0\) off"),
    (lambda x: x + 1e-6, r"found f\(0\) = 1e-06"),
    (torch.abs, GUIDED),
    (lambda x: x.clamp(-20, 20), GUIDED),
    (torch.round, GUIDED),
    (lambda x: x * x.norm(), "batch"),
    (lambda x: torch.where(x > 0, x, 0.5 * x), GUIDED),
    (nn.Dropout(0.5), "Linear: expected"),
    (lambda x: x - x.mean(0), "changes with the batch; don't mix along axis 0"),
    (lambda x: x.flip(0), "don't mix"),
    (lambda x: x * len(x), "don't mix"),
    (lambda x: x * math.nan, "Linear: expected"),
    (lambda x: x.detach() * 2, "without detach"),
    (lambda x: 2 * x - x.detach(), "without detach"),
    (lambda x: x.sum(1), r"found torch.float32 of shape \(3,\).*an axis 1 of size 1"),
    (lambda x: x.round().int(), "found torch.int32"),
    (lambda x: x.sum(0, keepdim=True), r"found torch.float32 of shape \(1, 4\)"),
    (lambda x: x.tolist(), "found list"),
]


@pytest.mark.parametrize("function, words", NOT_LINEAR, ids=range(len(NOT_LINEAR)))
@pytest.mark.parametrize("seed", range(3))
def test_a_function_that_is_no_linear_operator_is_refused(function, words, seed):
    with pytest.raises(ValueError, match=words):
        Linear(function, (4,), seed=seed)


def test_linear_operators_of_great_and_small_scale_are_accepted():
    for scale in (1e-20, 1.0, 1e20):
        assert Linear(lambda x, c=scale: c * x.flip(-1), (4,)).observed == (4,)
    assert Linear(lambda x: 0 * x, (4,)).observed == (4,)
    assert Linear(lambda x: torch.fft.fft2(x, norm="ortho").real, (1, 32, 32)).observed == (1, 32, 32)


# From a configuration

NODES = [
    dict(_target_="models.Blur", std=1.5),
    dict(_target_="models.Blur", kernel=[[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]),
    dict(_target_="models.Downsampling", factor=2),
    dict(_target_="models.Grayscale"),
    dict(_target_="models.Grayscale", weights=[1, 0, 0]),
    dict(_target_="models.RandomProjection", rows=4, seed=1),
    dict(_target_="models.Matrix", matrix=[[1.0] * 12]),
    dict(_target_="models.Mask", mask=[[1, 0], [1, 1]]),
    dict(_target_="models.box_mask", size=1),
    dict(_target_="models.box_mask", size=[1, 2]),
    dict(_target_="models.half_mask", side="top"),
    dict(_target_="models.random_mask", share=0.5, seed=2),
]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node["_target_"])
def test_a_configuration_builds_an_operator_for_the_shape_of_the_data(node):
    operator = build(node, shape=(3, 2, 2))
    assert isinstance(operator, LinearOperator) and operator.shape == (3, 2, 2)
    assert operator(torch.ones(1, 3, 2, 2)).shape == (1, *operator.observed)


def test_a_new_operator_states_two_methods():
    class Doubled(LinearOperator):
        def _forward(self, x):
            return 2 * x

    with pytest.raises(TypeError, match=r"abstract.*_adjoint"):
        Doubled((2,), (2,))
