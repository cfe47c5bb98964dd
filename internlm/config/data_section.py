"""The data section: what is read, how it is packed, and in which order."""

from typing import Annotated, Literal

from pydantic import Field

from internlm.config.section import PositiveInt, Section, Seed


class DataConfig(Section):
    """What is read, how it is packed, and in which order."""

    type: Literal["tokenized", "text", "chat", "preference", "megatron", "synthetic"] = Field(
        "tokenized",
        description="tokenized: .bin/.meta folders; text: txt/jsonl tokenised at the start; "
        "chat: jsonl/json/parquet/arrow of conversations, answers are trained on; preference: pairs, for dpo; "
        "megatron: .bin/.idx; synthetic: random tokens",
    )
    train_folder: str | None = Field(None, description="folder of the training data; None: the 2023 dummy data")
    valid_folder: str | None = Field(None, description="folder of the validation sets; None: no validation data")
    tokenizer_path: str | None = Field(
        None, description="sentencepiece model; required by type=text and chat, which also takes a Hugging Face folder"
    )
    chat_template: str | None = Field(
        None, description="type=chat: a built-in template, a Jinja file or a folder; None: that of tokenizer_path"
    )
    train_on: Literal["answers", "last", "all"] = Field(
        "answers", description='type=chat: assistant turns, only the last one, or everything; "trained" in a turn wins'
    )
    long_samples: Literal["cut", "drop", "split"] | None = Field(
        None, description="type=chat: what to do with samples longer than seq_len; None: an error"
    )
    text_key: str = Field("text", description="the key of a jsonl line that holds the text (type=text)")
    seq_len: PositiveInt = Field(description="longest attention segment, in tokens")
    micro_bsz: PositiveInt = Field(
        1, description="segments of seq_len per micro batch: a row holds seq_len * micro_bsz"
    )
    micro_num: PositiveInt = Field(1, description="micro batches per optimizer step and data rank (accumulation)")
    valid_micro_num: PositiveInt | None = Field(
        None, description="validation batch = valid_micro_num * micro_bsz samples; None: micro_num"
    )
    valid_every: Annotated[int, Field(ge=0)] = Field(0, description="validate every this many steps; 0: never")
    total_steps: PositiveInt = Field(description="batches to run, skipped ones included")
    packing: Literal["cut", "fit", "unpacked"] | None = Field(
        None,
        description="cut: samples end to end, cut at row ends; fit: as many whole samples as fit; unpacked: micro_bsz "
        "samples per row; None: fit for type=chat, else cut",
    )
    pack_sample_into_one: bool = Field(False, description="attention runs across samples in windows of seq_len")
    min_length: Annotated[int, Field(ge=0)] = Field(0, description="samples with fewer tokens are dropped")
    min_length_dict: dict[str, int] = Field({}, description="min_length for files whose path contains the key")
    mixture: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="weight per source (entry of train_folder); empty: everything once per epoch"
    )
    skip_batches: str = Field("", description='batches read but not trained, as "3,10-12"; counted from 0')
    rampup_batch_size: str = Field("", description='"START INCR EVERY" in micro batches; empty: constant')
    seed: Seed = Field(1024, description="seed of the order of rows")
    num_worker: Annotated[int, Field(ge=0)] = Field(4, description="loader processes per rank for training")
