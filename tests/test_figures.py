import struct
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from experiments import figures, likelihood_figures, plane_figures, training_figures
from experiments.canvas import running_mean, tile
from experiments.labels import place_labels


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plane(m=7):
    axis = torch.linspace(-2, 2, m)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)


BASELINES = {"uniform": (4.09, 0.0), "pixel_histogram": (2.3, 0.02)}
LEVELS = [(step, low, low + 2, 3.0 * 2.0**-low, 3 * (low < 4)) for step in range(10, 70, 10) for low in (-2, 0, 2, 4)]
DRAW = {
    "image_grid": lambda p: figures.image_grid(normal(7, 1, 8, 8), p, columns=4, title="digits"),
    "image_grid, colour": lambda p: figures.image_grid(normal(3, 3, 4, 6), p),
    "samples_beside_real": lambda p: figures.samples_beside_real(
        normal(9, 1, 8, 8), {"heun": normal(25, 1, 8, 8), "ddim": normal(12, 1, 8, 8)}, p, columns=4
    ),
    "loss_curve": lambda p: figures.loss_curve(range(90), normal(90).exp(), p, validation=[(10, 1.0), (60, 0.5)]),
    "loss_curve, one negative": lambda p: figures.loss_curve([1], [-2.0], p, validation=[]),
    "loss_by_noise_level": lambda p: training_figures.loss_by_noise_level(LEVELS, p),
    "loss_by_noise_level, one": lambda p: training_figures.loss_by_noise_level([(5, -1, 1, -3.0, 2)], p),
    "noise_to_data": lambda p: figures.noise_to_data(50 * normal(13, 2, 1, 8, 8), torch.linspace(1, 1e-5, 13), p),
    "noise_to_data, short": lambda p: figures.noise_to_data(torch.zeros(2, 1, 3, 4, 4), [1, 0], p),
    "trajectories_2d": lambda p: plane_figures.trajectories_2d(normal(5, 6, 2), p),
    "trajectories_2d, wide": lambda p: plane_figures.trajectories_2d(
        torch.logspace(2, 0, 5)[:, None, None] * normal(5, 6, 2), p, data=normal(80, 2)
    ),
    "score_fields": lambda p: plane_figures.score_fields(
        -plane().expand(2, 7, 7, 2), normal(2, 7, 7, 2), plane(), p, [0.1, 1]
    ),
    "density_maps": lambda p: plane_figures.density_maps(-8 * plane().square().sum(-1), normal(7, 7), plane(), p),
    "audit_bars": lambda p: figures.audit_bars({"prior": 2.0, "divergence": -0.5}, BASELINES, 1.5, 0.01, p),
    "histogram": lambda p: likelihood_figures.histogram({"test": normal(50), "other": 2 + normal(9)}, "bits", p),
    "histogram, constant": lambda p: likelihood_figures.histogram({"test": torch.ones(3)}, "bits", p, title="one"),
    "out_of_distribution": lambda p: likelihood_figures.out_of_distribution(
        {"bits": {"test": normal(50), "other": normal(9)}, "typicality": {"test": normal(50)}},
        {"bits": "AUROC 0.5", "typicality": ""},
        p,
    ),
    "extreme_images": lambda p: likelihood_figures.extreme_images(normal(50, 1, 8, 8), normal(50), "bits/dim", p),
    "extreme_images, two": lambda p: likelihood_figures.extreme_images(normal(2, 3, 8, 8), normal(2), "bits/dim", p),
    "extreme_points": lambda p: likelihood_figures.extreme_points(normal(30, 2), normal(30), "nats", p),
    "interpolated_images": lambda p: likelihood_figures.interpolated_images(normal(5, 2, 1, 8, 8), p),
    "interpolated_points": lambda p: likelihood_figures.interpolated_points(normal(5, 9, 2), p, normal(90, 2)),
    "samples_2d": lambda p: figures.samples_2d({"heun": 9 * normal(20, 2), "ddim": normal(9, 2)}, p, normal(30, 2)),
}


@pytest.mark.parametrize("name", DRAW)
def test_writes_a_picture_and_leaves_nothing_open(name, tmp_path):
    path = tmp_path / "new" / "figure.png"
    settings = dict(plt.rcParams)
    assert DRAW[name](path) == path
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:])) > 50
    assert plt.imread(path)[..., :3].std() > 0.01
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == settings


NAN = torch.full((4, 2), torch.nan)
WRONG = {
    "images: expected shape (N, C, H, W), found (3, 8, 8)": lambda p: figures.image_grid(normal(3, 8, 8), p),
    "1 or 3 channels, found (3, 2, 8, 8)": lambda p: figures.image_grid(normal(3, 2, 8, 8), p),
    "columns: expected at least 1, found 0": lambda p: figures.image_grid(normal(3, 1, 8, 8), p, columns=0),
    "samples['ddim']: expected shape (N, 1, 8, 8), found (2, 1, 4, 4)": lambda p: figures.samples_beside_real(
        normal(2, 1, 8, 8), {"ddim": normal(2, 1, 4, 4)}, p
    ),
    "steps: expected shape (3), found (2)": lambda p: figures.loss_curve([1, 2], [1.0, 2.0, 3.0], p),
    "validation: expected shape (V, 2), found (2)": lambda p: figures.loss_curve([1], [1.0], p, validation=[1, 2]),
    "times: expected shape (4), found (3)": lambda p: figures.noise_to_data(normal(4, 1, 1, 2, 2), [1, 2, 3], p),
    "trajectory: expected shape (K, N, 2), found (4, 5, 3)": lambda p: plane_figures.trajectories_2d(
        normal(4, 5, 3), p
    ),
    "learned: expected shape (1, 7, 7, 2), found (1, 7, 6, 2)": lambda p: plane_figures.score_fields(
        normal(1, 7, 7, 2), normal(1, 7, 6, 2), plane(), p, [1]
    ),
    "exact: expected shape (M, M), found (7, 6)": lambda p: plane_figures.density_maps(
        normal(7, 6), normal(7, 7), plane(), p
    ),
    "sum to value = 2.0000, found a sum of 1.5000": lambda p: figures.audit_bars({"prior": 1.5}, {}, 2.0, 0.0, p),
    "groups['a']: expected finite numbers, found 8 NaN": lambda p: likelihood_figures.histogram(
        {"a": NAN.flatten()}, "bits", p
    ),
    "values: expected shape (4), found (3)": lambda p: likelihood_figures.extreme_images(
        normal(4, 1, 2, 2), normal(3), "bits", p
    ),
    "points: expected shape (n, P, C, H, W), found (4, 2)": lambda p: likelihood_figures.interpolated_images(NAN, p),
    "data: expected finite numbers, found 8 NaN": lambda p: figures.samples_2d({}, p, NAN),
}


@pytest.mark.parametrize("words", WRONG)
def test_refuses(words, tmp_path):
    with pytest.raises(ValueError) as error:
        WRONG[words](tmp_path / "figure.png")
    assert words in str(error.value)
    assert not any(tmp_path.iterdir())


def test_importing_does_not_import_matplotlib():
    code = "import sys, experiments.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tile_puts_images_row_by_row_between_white_lines():
    images = torch.tensor([-1.0, 0.0, 1.0, -5.0, 5.0]).view(5, 1, 1, 1).expand(-1, 1, 8, 8)
    picture = tile(images, columns=3)
    side = picture.shape[1] // 3
    assert picture.shape == (2 * side, 3 * side, 3)
    centres = picture[side // 2 :: side, side // 2 :: side, 0]
    assert centres.tolist() == [[0, 0.5, 1], [0, 1, 1]]
    assert (picture[0] == 1).all()
    assert (picture[:, side] == 1).all()


def test_running_mean_keeps_lines_and_ends():
    assert running_mean(torch.ones(9), 4).tolist() == [1] * 9
    assert running_mean(torch.arange(9.0), 3)[1:-1].tolist() == list(range(1, 8))
    assert running_mean(torch.arange(4.0), 1).tolist() == [0, 1, 2, 3]


def test_labels_cover_neither_each_other_nor_points():
    points = 400 + 25 * normal(12, 1, 2, seed=3).double()
    sizes = torch.tensor([[90.0, 16.0]], dtype=torch.float64).repeat(12, 1)
    anchors, centres = place_labels(list(points), sizes, torch.tensor([0.0, 0.0, 800.0, 800.0]).double())
    assert torch.equal(anchors, points[:, 0])
    apart = (centres[:, None] - centres).abs() >= sizes
    assert (apart.any(dim=-1) | torch.eye(12, dtype=torch.bool)).all()
    assert ((centres[:, None] - anchors).abs() > sizes / 2).any(dim=-1).all()
    assert ((centres - 400).abs() < 400 - sizes / 2).all()
