"""What the routers of a model do in a step: the weight of their losses before it, their load after it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.config.schema import Config
from internlm.core.collectives import all_reduce_
from internlm.core.mesh import Mesh
from internlm.model.moe import Router


@dataclass(frozen=True)
class ExpertLoad:
    """Routers of a step, over all ranks and layers. A load of 1 is an expert's fair share of the choices."""

    balance_loss: float  # as it is in the objective, weight included
    z_loss: float  # likewise
    loads: tuple[float, ...]  # of each expert, mean over layers
    largest: float  # load of any expert in any layer
    smallest: float
    dropped: float  # share of the choices

    def scalars(self) -> dict[str, float]:
        """Flat, under the names of the log; `moe_loss` is that of 2023."""
        named = {
            "moe_loss": self.balance_loss,
            "moe_z_loss": self.z_loss,
            "load/max": self.largest,
            "load/min": self.smallest,
            "load/dropped": self.dropped,
        }
        return named | {f"load/expert_{index}": load for index, load in enumerate(self.loads)}


class Routing:
    """The routers on this rank. Without experts there are none, and all of this does nothing."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.loss = config.model, config.loss
        # by layer; blocks that are on other stages have none here
        self.routers = {
            int(name.split(".")[1]): module for name, module in model.named_modules() if isinstance(module, Router)
        }

    @property
    def active(self) -> bool:
        return self.model.num_experts > 1

    def begin_step(self, weight: float) -> None:
        """`weight`: of a row in the step, loss scale included."""
        for router in self.routers.values():
            router.ledger.begin_step(self.loss.moe_loss_coeff * weight, self.loss.moe_z_loss_coeff * weight)

    def end_step(self, mesh: Mesh, num_rows: int, ok: Tensor) -> Tensor:
        """Adds up what all ranks noted, and moves the biases if the update was made (`ok` bool []).

        Returns a summary for `load_of` on the device. Collective; does not wait for the device.
        """
        num_experts, layers = self.model.num_experts, self.model.num_layers
        facts = torch.zeros(layers, num_experts + 3, dtype=torch.float64, device=mesh.device)
        for index, router in self.routers.items():
            if router.ledger.sums is not None:
                facts[index] = router.ledger.sums
        all_reduce_(facts, mesh.world_group)
        choices = facts[:, :num_experts].sum(1, keepdim=True)
        loads = facts[:, :num_experts] * num_experts / choices
        for index, router in self.routers.items():
            router.move_bias(loads[index], ok)
        balance, z, dropped = facts[:, num_experts:].unbind(1)
        losses = (balance.sum() * self.loss.moe_loss_coeff, z.sum() * self.loss.moe_z_loss_coeff)
        scalars = (*(loss / num_rows for loss in losses), loads.max(), loads.min(), dropped.sum() / choices.sum())
        return torch.cat((torch.stack(scalars), loads.mean(0)))


def load_of(summary: list[float]) -> ExpertLoad | None:
    """What `Routing.end_step` returned, on the host; None where it was nothing."""
    if not summary:
        return None
    balance, z, largest, smallest, dropped, *loads = summary
    return ExpertLoad(balance, z, tuple(loads), largest, smallest, dropped)
