"""A stage's part of the model: what other stages have is taken out before there is memory."""

from torch import nn

from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.model.transformer import Transformer
from internlm.parallel.split import pipeline_layout


class Absent(nn.Module):
    """In place of a part of the model that another stage has, so that names stay those of the whole model."""

    def forward(self, *args: object) -> None:
        raise AssertionError("this part of the model is on another stage")


def cut_stages(model: Transformer, config: Config, mesh: Mesh) -> list[str]:
    """Takes from a model on the meta device what other stages have.

    Returns the names of parameters that first and last stage have both: the tied embedding, unless its two uses are on
    one stage.
    """
    layout, stage = pipeline_layout(config), mesh.coordinates["pipeline"]
    here = set(layout.parts_of(stage))
    copied = config.model.tie_word_embeddings and layout.stage_of[0] != layout.stage_of[-1]
    if copied and "head" in here:
        here.add("embedding")
    for index in range(len(model.layers)):
        if f"layers.{index}" not in here:
            model.layers[index] = Absent()
    for name in ("embedding", "head"):
        if name not in here:
            setattr(model, name, Absent())
    return ["embedding.weight"] if copied and "embedding" in here else []
