"""What a person reads at the end of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.baselines import Baseline
from experiments.table_cells import table

if TYPE_CHECKING:
    from experiments.audit import Audit  # which writes its own table with this module's


def likelihood(
    found: "Audit", split: str, baselines: dict[str, Baseline] | None = None, exact: dict[str, float] | None = None
) -> str:
    """The audit, beside baselines or the exact value where there are any."""
    lines = [f"Likelihood of {found.n} examples of the {split} split", str(found)]
    if exact:
        gap = f"model minus exact: {exact['gap']:+.4f}, RMS {exact['rms']:.4f}"
        lines.append(f"exact log-density: {exact['mean']:.4f} nats; {gap}")
    if baselines:
        beside = {name.replace("_", " "): (b.bits_per_dim, b.stderr) for name, b in baselines.items()}
        beside["this model"] = (found.value, found.stderr)
        ranked = sorted(beside.items(), key=lambda item: -item[1][0])
        rows = [(name, f"{bits:.3f} ± {stderr:.3f}") for name, (bits, stderr) in ranked]
        lines += ["", table((f"{split} data", found.unit), rows)]
    return "\n".join(lines)


def original_units(value: float, stderr: float, log_det: float) -> str:
    """The mean log-density of standardized data, nats, in the units that they came in."""
    total = f"log p = {value + log_det:.4f} ± {stderr:.4f} nats"
    return f"in the units of the file: {total}, with the standardization's log-determinant {log_det:+.4f}"


def out_of_distribution(
    unit: str,
    means: dict[str, float],
    scores: dict[str, tuple[float, float]],
    other: str,
    reference: tuple[str, float],
) -> str:
    """How well each score tells another data set apart, and what must be known to read it."""
    rows = [(label, f"{area:.3f} ± {stderr:.3f}") for label, (area, stderr) in scores.items()]
    told = "; ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return "\n".join(
        [
            f"Is {other} told apart from the test data by its likelihood? Mean {unit}: {told}",
            table(("score, high for the other data set", "AUROC"), rows),
            f"typicality: distance from the mean of the {reference[0]} split, {reference[1]:.3f}",
            "Likelihood alone is known to fail: simple images can be more likely than what a model was trained on",
            "(AUROC below 0.5; Nalisnick et al., 2019); typicality sees them, but not other data that cost the same.",
        ]
    )


def pictures(paths: list[Path]) -> str:
    """Where the pictures are."""
    return "\n".join(["Pictures:", *(f"  {path}" for path in paths)])


def quality(found: dict[str, dict[str, float]], sampler: str) -> str:
    """Whether samples are copies of training images, and whether a classifier takes them for digits."""
    near = found["nearest_training_image"]
    median = f"median {near['samples_median']:.1f} (real {near['test_median']:.1f})"
    smallest = f"smallest {near['samples_min']:.1f} (real {near['test_min']:.1f})"
    lines = [
        f"Samples of {sampler} beside real test images",
        f"  distance to the nearest training image, in levels: {median}, {smallest}",
    ]
    if sure := found.get("classifier_confidence"):
        real = f"real {sure['test']:.3f}; its accuracy {sure['accuracy']:.3f}"
        lines.append(f"  mean confidence of a classifier: {sure['samples']:.3f} ({real})")
    return "\n".join(lines)
