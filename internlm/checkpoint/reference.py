"""The fixed model of preference tuning: the weights that the run started from, held frozen beside the trained ones."""

from functools import partial

import torch
from torch import Tensor

from internlm.checkpoint.control import Control
from internlm.checkpoint.loading import Loader
from internlm.config.schema import Config
from internlm.core.lanes import Lane
from internlm.core.mesh import Mesh
from internlm.model.batch import Batch
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.preference import TokenLosses
from internlm.train.state import TrainState


def build_reference(config: Config, mesh: Mesh, lanes: tuple[Lane, Lane]) -> TokenLosses:
    """-log p of every label of a row, [tokens], under the model of `ckpt.load_ckpt_info`.

    Its parameters are sharded as the trained model's are; it has no gradients and no optimizer states. `lanes`
    are those of the trained model's engine. Collective, also each call.
    """
    assert config.ckpt.load_ckpt_info is not None  # config/checks.py
    start = config.ckpt.load_ckpt_info.model_copy(update={"content": ("model",)})
    ckpt = config.ckpt.model_copy(update={"auto_resume": False, "load_ckpt_info": start})
    frozen = config.model_copy(update={"ckpt": ckpt})
    model = build_model(frozen).requires_grad_(False).eval()
    placements = parallelize(model, frozen, mesh)
    initial = partial(initial_value, config=config.model, seed=config.seed)
    engine = HybridZero(model, frozen, mesh, initial, placements, lanes=lanes)
    Loader(frozen, engine, TrainState(), Control(), {}).resume()

    @torch.no_grad()
    def token_losses(row: Batch) -> Tensor:
        losses = model.loss(row).token_losses
        engine.wait()  # drops what was gathered
        return losses

    return token_losses
