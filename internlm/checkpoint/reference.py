"""The fixed model of preference tuning: the weights that the run started from.

Its log-probabilities are computed for each row when that is trained on, by weights that are held frozen beside the
trained ones; or once, before training, see reference_sums.py.
"""

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
from internlm.model.transformer import Transformer, build_model
from internlm.parallel.expert import row_of_sequence
from internlm.parallel.parallelize import parallelize
from internlm.parallel.sequence import own_part
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.preference import PreferenceLoss, answer_sums
from internlm.train.state import TrainState


def build_objective(config: Config, mesh: Mesh, lanes: tuple[Lane, Lane]) -> PreferenceLoss | None:
    """What is trained, with its reference; None: cross-entropy of the next token. Collective."""
    if config.dpo is None:
        return None
    each_step = config.dpo.reference == "each_step"
    sums = partial(sums_of, *build_reference(config, mesh, lanes), mesh) if each_step else None
    return PreferenceLoss(config.dpo, sums, row_of_sequence(mesh))


def build_reference(config: Config, mesh: Mesh, lanes: tuple[Lane, Lane]) -> tuple[Transformer, HybridZero]:
    """The model of `ckpt.load_ckpt_info`, and its engine.

    Its parameters are sharded as the trained model's are; it has no gradients and no optimizer states. `lanes`
    are those of the trained model's engine. Collective.
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
    return model, engine


@torch.no_grad()
def sums_of(model: Transformer, engine: HybridZero, mesh: Mesh, row: Batch) -> Tensor:
    """-log p of the answers of a row, fp64 [2 * pairs]. Collective."""
    losses = model.loss(own_part(row, mesh).to(mesh.device)).token_losses
    engine.wait()  # drops what was gathered
    return answer_sums(row_of_sequence(mesh).gather(losses), row)
