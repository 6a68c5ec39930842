"""The figure of systems.md: samples of each system by its own sampler, from the folders of its runs.

python docs/systems_figure.py FOLDER        where FOLDER/ddpm, FOLDER/iddpm, ... are run folders
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

SAMPLERS = {
    "ddpm": "ddpm",
    "iddpm": "ddpm",
    "ncsn": "annealed_langevin",
    "ncsnv2": "annealed_langevin",
    "score_sde_vp": "predictor_corrector",
    "score_sde_ve": "predictor_corrector",
    "score_sde_subvp": "predictor_corrector",
    "scoreflow": "probability_flow",
    "vdm": "ancestral",
    "edm": "heun",
    "rectified_flow": "euler",
    "sliced_score_matching": "predictor_corrector",
}
COUNT = 20


def main(folder: Path) -> None:
    """Write docs/images/systems.png: one row of the first samples of each system."""
    figure, axes = plt.subplots(len(SAMPLERS), 1, figsize=(10, 0.62 * len(SAMPLERS)))
    for axis, (system, sampler) in zip(axes, SAMPLERS.items(), strict=True):
        x = np.load(folder / system / "samples" / f"{sampler}.npy", allow_pickle=False)[:COUNT, 0]
        row = np.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=1).transpose(1, 0, 2).reshape(x.shape[1], -1)
        axis.imshow(row, cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(system, rotation=0, ha="right", va="center")
    figure.savefig(Path(__file__).parent / "images" / "systems.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
