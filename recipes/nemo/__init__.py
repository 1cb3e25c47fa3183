"""nemo-run for recipes: its command line, executors and experiments around megatron_trd's settings.

It launches torchrun with `megatron_trd.training.worker RECIPE key=value … --resume`. The submitting machine needs
nemo-run but no torch; the ranks need torch but no nemo-run.
"""

from recipes.nemo.command import main, task
from recipes.nemo.executors import local, slurm

__all__ = ["local", "main", "slurm", "task"]
