"""Tells torchtitan, which imports this, of a Llama with the sizes of a case and of random tokens (`peer.py`)."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
from torchtitan.protocols.train_spec import register_train_spec

from internlm.config.schema import Config

CONFIG = Config.model_validate_json(os.environ["INTERNLM_CASE"])
MODEL = CONFIG.model


class Rows(IterableDataset):
    """Rows of random tokens and the tokens after them, without end."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = torch.randint(MODEL.vocab_size, (self.seq_len + 1,))
            yield {"input": tokens[:-1]}, tokens[1:]


def build_dataloader(dp_world_size: int, dp_rank: int, job_config: Any, **_: Any) -> ParallelAwareDataloader:
    training = job_config.training
    return ParallelAwareDataloader(
        Rows(training.seq_len), dp_rank, dp_world_size, batch_size=training.local_batch_size, num_workers=2
    )


sizes = TransformerModelArgs(
    dim=MODEL.hidden_size,
    n_layers=MODEL.num_layers,
    n_heads=MODEL.num_attention_heads,
    n_kv_heads=MODEL.num_kv_heads,
    vocab_size=MODEL.vocab_size,
    # its width of the feed-forward layer is 2/3 of 4 * dim, times this, rounded down, then up to a multiple
    ffn_dim_multiplier=MODEL.ffn_size / int(8 * MODEL.hidden_size / 3),
    multiple_of=64,
)
spec = replace(
    get_train_spec(), model_args={"case": sizes}, build_dataloader_fn=build_dataloader, build_tokenizer_fn=None
)
register_train_spec("internlm_case", spec)
