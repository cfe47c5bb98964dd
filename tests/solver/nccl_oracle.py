"""Run by torchrun: the engine on GPUs against torch's AdamW on one of them, for every divisor chain of the world.

torchrun --nproc_per_node=2 -m tests.solver.nccl_oracle
"""

import gc

import torch.distributed as dist

from internlm.core.launch import launch
from tests.solver.tiny import difference, divisor_chains, make_config, train_engine, train_reference

TOLERANCE = 2e-6  # fp32; a GPU's matrix products sum in another order for another number of rows


def main() -> None:
    worst = 0.0
    with launch() as world:
        for clip in (0.0, 0.1):
            reference = train_reference(make_config(clip=clip), device=world.device)
            for chain in divisor_chains(world.size):
                for accumulation in (1, 3):
                    config = make_config(chain, clip)
                    run = train_engine(world.rank, world.size, config, accumulation, device=world.device)
                    found = difference(run, reference)
                    worst = max(worst, *found.values())
                    if world.rank == 0:
                        shown = "  ".join(f"{name} {value:.1e}" for name, value in found.items())
                        print(f"(p, g, os) = {chain}  accumulation {accumulation}  clip {clip}  {shown}", flush=True)
                    del run
                    gc.collect()
        dist.barrier()
    assert worst < TOLERANCE, worst


if __name__ == "__main__":
    main()
