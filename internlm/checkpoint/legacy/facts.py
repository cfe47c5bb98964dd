"""What the names and shapes of a folder's tensors say about the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from internlm.checkpoint.legacy.tables import EXPERTS, MLP_NAMES, Family, family_of
from internlm.utils.errors import UserError

Shape = Callable[[str], tuple[int, ...]]  # of the first rank's part of a tensor


@dataclass(frozen=True)
class Facts:
    """What the tensors say about the model."""

    family: Family
    mlp: Literal["old", "new"]
    split_hidden: bool
    num_layers: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    qkv_bias: bool
    out_bias: bool
    num_experts: int
    has_shared: bool  # a dense layer beside the experts

    @property
    def model_type(self) -> str:
        """The family with its experts, as configs of 2023 named it."""
        return "INTERNLM_MoE" if self.num_experts > 1 else self.family


def detect(
    keys: Mapping[str, object],
    shape: Shape,
    num_layers: int,
    num_experts: int,
    tensor_size: int,
    cut: int,
    mlp: Literal["old", "new"] | None,
    path: str,
) -> Facts:
    """`keys`: with global layer numbers. `cut`: how many ranks shared the matrices of a block. `path` is for messages.

    Raises UserError for an unknown family, and where w2 and w3 could be either and `mlp` doesn't say which.
    """
    family = family_of(keys)
    if family is None:
        some = ", ".join(list(keys)[:3])
        raise UserError(f"{path} is of no known family: it has neither Wqkv, wqkv nor wq (its keys: {some} ...)")
    block, inner = ("blocks.0", "mlp") if family == "INTERNLM" else ("layers.0", "feed_forward")
    embedding, head = ("embedding", "head") if family == "INTERNLM" else ("tok_embeddings", "output")
    qkv = {"INTERNLM": "mixer.Wqkv", "INTERNLM2_PUBLIC": "attention.wqkv", "LLAMA2": "attention.wq"}[family]
    out = "mixer.out_proj" if family == "INTERNLM" else "attention.wo"
    if f"{block}.{inner}.fc1.weight" in keys:
        raise UserError(f"{path} was trained with use_swiglu=False; only SwiGLU feed-forwards are built")
    hidden = shape("norm.weight")[0]
    expert = f"{block}.{inner}.{EXPERTS['new']}.0" if num_experts > 1 else f"{block}.{inner}"
    widths = {name: shape(f"{expert}.{name}.weight") for name in ("w1", "w2", "w3")}
    return Facts(
        family=family,
        mlp=_mlp_names(family, widths, hidden, mlp, path),
        split_hidden=f"{embedding}.weight" in keys,
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=shape(f"{head}.weight")[0] * tensor_size,
        intermediate_size=widths["w1"][0] * cut,
        qkv_bias=f"{block}.{qkv}.bias" in keys,
        out_bias=f"{block}.{out}.bias" in keys,
        num_experts=num_experts,
        has_shared=f"{block}.{inner}.residual_mlp.w1.weight" in keys,
    )


def _mlp_names(
    family: Family, shapes: dict[str, tuple[int, ...]], hidden: int, mlp: Literal["old", "new"] | None, path: str
) -> Literal["old", "new"]:
    """The one of w2 and w3 with `hidden` columns is the up projection, beside the gate."""
    is_up = {name: shapes[name][1] == hidden for name in ("w2", "w3")}
    if is_up["w2"] != is_up["w3"]:
        found: Literal["old", "new"] = "old" if is_up["w2"] else "new"
        if mlp not in (None, found):
            output = MLP_NAMES[found]["down"]
            raise UserError(f"{path}: by its shapes {output} is the output of the feed-forward layer; omit --version")
        return found
    if mlp is not None:
        return mlp
    if family == "INTERNLM2_PUBLIC":
        return "new"  # its names never changed
    raise UserError(
        f"{path}: w2 {list(shapes['w2'])} and w3 {list(shapes['w3'])} have shapes that don't tell which is the output "
        "of the feed-forward layer. It is w3 in InternLM 0.1 to 0.2.1 and InternEvo up to 0.2.3, w2 from InternEvo "
        "0.3.0 on: convert the folder with tools/convert2hf.py --version 1 (w3) or --version 2 (w2), and train on what "
        'that writes, with ckpt.load_ckpt_info.path and ckpt.load_ckpt_info.ckpt_type = "hf"'
    )
