"""The engine against torch's AdamW in one process, for every way to cut."""

import pytest
import torch

from tests.pool import run_ranks
from tests.solver.tiny import Chain, Run, difference, divisor_chains, make_config, train_engine, train_reference

CLIP = 0.5  # below the norm of every step, so that clipping always acts


def differences_to_reference(
    rank: int, world_size: int, references: dict[float, Run]
) -> dict[tuple[Chain, int, float], dict[str, float]]:
    return {
        (chain, accumulation, clip): difference(
            train_engine(rank, world_size, make_config(chain, clip), accumulation), reference
        )
        for chain in divisor_chains(world_size)
        for accumulation in (1, 3)
        for clip, reference in references.items()
    }


@pytest.fixture(scope="module")
def references() -> dict[float, Run]:
    runs = {clip: train_reference(make_config(clip=clip)) for clip in (0.0, CLIP)}
    assert min(runs[CLIP].norms) > CLIP
    return runs


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_divisor_chain_trains_as_one_process_does(world_size: int, references: dict[float, Run]) -> None:
    for found in run_ranks(world_size, differences_to_reference, references):
        assert len(found) == 4 * len(divisor_chains(world_size))
        for case, differences in found.items():
            assert max(differences.values()) < 1e-6, (case, differences)
