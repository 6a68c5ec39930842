"""``python -m experiments`` is ``score-sde``, for launchers that start modules: ``torchrun -m experiments ...``."""

from experiments.cli import main

if __name__ == "__main__":
    main()
