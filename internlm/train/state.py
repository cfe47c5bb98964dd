"""What a run has done so far: with weights and optimizer, all that a resume needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    """Counters of a run. Data order and schedules are functions of them."""

    step_count: int = 0  # successful updates; the schedules' clock
    batch_count: int = 0  # batches done, skipped ones included; the index of the next batch to read
    place: int | None = 0  # in the order of rows, behind these batches; None: as if this run had made all of them
    num_rows: int | None = None  # of the data in whose order `place` is; None: not known
    num_consumed_tokens: int = 0  # over all data ranks, padding included, of batches that were computed
    inf_nan_skip_batches: int = 0  # batches whose update was dropped because a gradient was not finite

    def state_dict(self) -> dict[str, int | None]:
        return asdict(self)

    def load_state_dict(self, values: Mapping[str, int | None]) -> None:
        """Take the counters from `values`; raises KeyError for a missing one."""
        for field in fields(self):
            setattr(self, field.name, values[field.name])
