"""The tokenizer files of a Hugging Face folder, from a sentencepiece model or from another folder.

tokenizer.json is built by us and named PreTrainedTokenizerFast, because that class takes the file as it is.
LlamaTokenizer of transformers 5 rebuilds its own pre-tokenizer and ignores the sentencepiece normaliser's switches.
tokenizer.model is copied beside it for engines that read sentencepiece themselves.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from internlm.checkpoint.fast_tokenizer import read_proto, write_fast_tokenizer
from internlm.data.chat_template import ChatTemplate
from internlm.data.tokenizer import INTERNLM2_NAMES
from internlm.utils.errors import UserError
from internlm.utils.json_files import read_json, write_json
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenizerSource:
    """What an export needs to know of a tokenizer before it writes anything."""

    path: Path
    size: int  # ids
    special_ids: dict[str, Any]  # bos_token_id, eos_token_id (or a list), pad_token_id; None where there is none

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer. A chat model's folder may name more than its tokenizer's one."""
        ids = self.special_ids["eos_token_id"]
        if ids is None:
            return []
        return ids if isinstance(ids, list) else [ids]


def inspect_tokenizer(path: str | Path, vocab_size: int) -> TokenizerSource:
    """Look at a sentencepiece model file or a Hugging Face folder. Raises UserError if it does not fit the model."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist; give a sentencepiece .model file or a Hugging Face folder")
    if path.name == "tokenizer.json":  # which a run may name alone
        path = path.parent
    source = _open_folder(path) if path.is_dir() else _open_sentencepiece(path)
    if source.size > vocab_size:
        raise UserError(
            f"tokenizer {path} has {source.size} ids, the model's vocab_size is {vocab_size}: "
            "it is not the one that the model was trained with"
        )
    if source.size < vocab_size:
        logger.warning(f"tokenizer {path} has {source.size} ids, the model {vocab_size}: the rest is never produced")
    return source


def check_export(source: TokenizerSource, folder: Path) -> None:
    """Raises UserError where `source` could not be written into `folder`, in time: nothing has been written yet."""
    path = source.path.resolve()
    if folder.resolve() in (path, path.parent):
        raise UserError(f"tokenizer {source.path} lies in the target folder {folder}: move it to another place")
    if not source.is_folder:
        read_proto(SentencePieceProcessor(model_file=str(source.path)))


def write_tokenizer(
    source: TokenizerSource, folder: Path, max_length: int, template: ChatTemplate | None = None
) -> dict[str, Any]:
    """Write the tokenizer files into `folder`; `max_length` is the longest input in tokens.

    With a chat template, its turn marks become special tokens, also those for which InternLM2's tokenizer has free
    pieces of other names.
    Returns the special ids for generation_config.json: an answer also ends at the template's stop tokens.
    """
    _write_files(source, folder, max_length, template)
    if template is None:
        return source.special_ids
    # without marks of what to train on, which other engines don't know
    (folder / "chat_template.jinja").write_text(template.plain_source, encoding="utf-8")
    return _with_stops(source, folder, template)


def _with_stops(source: TokenizerSource, folder: Path, template: ChatTemplate) -> dict[str, Any]:
    about = read_json(folder / "tokenizer.json")
    vocab = about.get("model", {}).get("vocab", {})
    ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    ids.update({token["content"]: token["id"] for token in about.get("added_tokens", [])})
    if missing := [text for text in template.stop if text not in ids]:
        logger.warning(
            f"the tokenizer has no token {', '.join(missing)}, at which answers of chat template {template.name} end: "
            "generation goes on until another stop token or the length limit"
        )
    stops = list(dict.fromkeys([*source.end_ids, *(ids[text] for text in template.stop if text in ids)]))
    return {**source.special_ids, "eos_token_id": stops[0] if len(stops) == 1 else stops or None}


def _write_files(source: TokenizerSource, folder: Path, max_length: int, template: ChatTemplate | None) -> None:
    if source.is_folder:
        for name in TOKENIZER_FILES:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, folder / name)
        return
    processor = SentencePieceProcessor(model_file=str(source.path))
    shutil.copyfile(source.path, folder / "tokenizer.model")
    bos, eos, unk = (processor.id_to_piece(index) if index >= 0 else None for index in _special_ids(processor))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": eos,  # as InternLM's exports; it has no piece for padding
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)
    special = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if settings[key]}
    write_json(folder / "special_tokens_map.json", special)
    pieces = {processor.id_to_piece(i) for i in range(processor.vocab_size())}
    renamed = {
        piece: name
        for name, piece in INTERNLM2_NAMES.items()
        if template is not None and piece in pieces and name in template.source
    }
    marks = {*template.stop, *(name for name in INTERNLM2_NAMES if name in template.source)} if template else set()
    write_fast_tokenizer(processor, folder / "tokenizer.json", renamed, marks)


def _special_ids(processor: SentencePieceProcessor) -> tuple[int, int, int]:
    return processor.bos_id(), processor.eos_id(), processor.unk_id()


def _open_sentencepiece(path: Path) -> TokenizerSource:
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer {path} is not a sentencepiece model: {error}") from error
    bos, eos, _ = (index if index >= 0 else None for index in _special_ids(processor))
    special = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    return TokenizerSource(path, processor.vocab_size(), special)


def _open_folder(path: Path) -> TokenizerSource:
    if not (path / "tokenizer.json").exists():
        if (path / "tokenizer.model").exists():
            return _open_sentencepiece(path / "tokenizer.model")
        raise UserError(f"tokenizer folder {path} holds neither tokenizer.json nor tokenizer.model")
    about = read_json(path / "tokenizer.json")
    vocab = about["model"]["vocab"]
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    added = {token["content"]: token["id"] for token in about.get("added_tokens", [])}
    settings = read_json(path / "tokenizer_config.json")
    special: dict[str, Any] = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        special[f"{kind}_token_id"] = added.get(token["content"] if isinstance(token, dict) else token)
    files = [path / name for name in ("generation_config.json", "config.json") if (path / name).exists()]
    stop = read_json(files[0]).get("eos_token_id") if files else None
    if stop is not None:  # a chat model stops at more ids than its tokenizer's eos
        special["eos_token_id"] = stop
    return TokenizerSource(path, 1 + max([*ids, *added.values()]), special)
