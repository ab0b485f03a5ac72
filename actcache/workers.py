"""Which worker this process is, from the variables that torchrun and srun set. Imports nothing heavy.

Every worker owns the shards `shard % world_size == rank`: no lock, no coordinator, and any number of workers in the
next run finishes what is missing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from actcache.errors import IncompleteError, SettingsError

_VARIABLES = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # SLURM_NTASKS is set without srun, too
)


@dataclass(frozen=True)
class Worker:
    """One of `world_size` processes that run the same command. `local_rank` counts on its host and picks the GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def owns(self, shard: int) -> bool:
        return shard % self.world_size == self.rank

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def check_others(self, n_missing: int, n_shards: int, kind: str) -> None:
        """Raise IncompleteError, once this worker's own shards are done, while others' are missing."""
        if n_missing:
            raise IncompleteError(
                f"Worker {self.rank} of {self.world_size} is done. {n_missing} of {n_shards} shards are "
                f"other workers'; the last to finish seals the {kind}. If one died, run the same command again."
            )


def find_worker(environment: Mapping[str, str] = os.environ) -> Worker:
    """The worker this process is; alone unless torchrun or srun started it.

    Raises:
        SettingsError: the variables are no whole numbers, or the rank lies outside the world.
    """
    for launcher, rank, world_size, local_rank in _VARIABLES:
        if rank in environment and world_size in environment:
            found = {name: environment.get(name, "0") for name in (rank, world_size, local_rank)}
            try:
                worker = Worker(*(int(value) for value in found.values()))
            except ValueError as error:
                raise SettingsError(f"{launcher} set {found}; expected whole numbers.") from error
            if not 0 <= worker.rank < worker.world_size or worker.local_rank < 0:
                raise SettingsError(f"{launcher} set {found}; expected 0 <= {rank} < {world_size}.")
            return worker
    return Worker()
