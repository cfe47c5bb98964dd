"""What a run writes and whom it notifies: the sections `ckpt` and `monitor`."""

from typing import Annotated, Literal

from pydantic import Field

from internlm.config.section import PositiveInt, Section


class LoadConfig(Section):
    """A checkpoint to start from."""

    path: str = Field(description="checkpoint folder")
    content: tuple[Literal["model", "optimizer", "scheduler", "sampler", "all"], ...] = Field(
        ("model",), strict=False, description="what is taken from it"
    )
    ckpt_type: Literal["internlm", "hf"] = Field("internlm", description="internlm: our folders; hf: Hugging Face")


class CkptConfig(Section):
    """Where and when checkpoints are written, and what a run starts from."""

    enable_save_ckpt: bool = Field(True, description="write checkpoints at all")
    save_ckpt_folder: str | None = Field(None, description="folder or fsspec URL; None: RUN_DIR/checkpoints")
    checkpoint_every: PositiveInt | None = Field(None, description="save every this many steps; None: only the last")
    keep_last: PositiveInt | None = Field(None, description="newest normal checkpoints to keep; None: all")
    oss_snapshot_freq: PositiveInt | None = Field(
        None, description="snapshot every this many steps, of which only the newest is kept; None: off"
    )
    snapshot_ckpt_folder: str | None = Field(None, description="None: save_ckpt_folder/snapshot")
    async_upload: bool = Field(True, description="write in the background, off the training path")
    auto_resume: bool = Field(True, description="start from the newest intact checkpoint in save_ckpt_folder, if any")
    load_ckpt_info: LoadConfig | None = Field(None, description="where to start if nothing is resumed")
    stop_file_path: str | None = Field(
        None, description="file with one integer N: at step N save and stop; at step -N save and go on; 0: nothing"
    )


class AlertConfig(Section):
    enable_feishu_alert: bool = Field(False, description="post start, end, loss spikes, a stuck run and exceptions")
    feishu_alert_address: str | None = Field(None, description="URL of the Feishu (Lark) webhook")
    alert_file_path: str | None = Field(
        None, description="every rank posts its exception, equal ones only once: file that lists those posted"
    )


class MonitorConfig(Section):
    enable_tb: bool = Field(True, description="write TensorBoard files, when tensorboard is installed")
    tensorboard_folder: str | None = Field(None, description="None: RUN_DIR/tensorboard")
    stuck_after: Annotated[float, Field(ge=0)] = Field(
        600.0, description="every rank logs its stack after this many seconds without a finished step; 0: never"
    )
    max_skips_in_row: Annotated[int, Field(ge=0)] = Field(
        100, description="batches in a row without an update (gradients not finite) that end the run; 0: none"
    )
    slow_rank_every: Annotated[int, Field(ge=0)] = Field(
        50, description="steps between comparisons of the ranks' time for forward and backward; 0: never"
    )
    slow_rank_ratio: Annotated[float, Field(ge=1)] = Field(
        1.1, description="a rank is slow if it takes this many times the average"
    )
    alert: AlertConfig = Field(AlertConfig(), description="messages to people")
