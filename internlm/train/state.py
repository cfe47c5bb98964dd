"""What a run has done so far: with weights and optimizer, all that a resume needs."""

from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    """Counters of a run. Data order and schedules are functions of them."""

    step_count: int = 0  # successful updates; the schedules' clock
    batch_count: int = 0  # batches done, skipped ones included; the index of the next batch to read
    num_consumed_tokens: int = 0  # over all data ranks, padding included, of batches that were computed
    inf_nan_skip_batches: int = 0  # batches whose update was dropped because a gradient was not finite

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, values: dict[str, int]) -> None:
        """Take the counters from `values`; raises KeyError for a missing one."""
        for field in fields(self):
            setattr(self, field.name, int(values[field.name]))
