"""A sentencepiece model as tokenizer.json.

The only place that needs `tokenizers` and `protobuf` (requirements/export.txt).
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from internlm.data.encoder import SPACE
from internlm.data.tokenizer import is_control_like
from internlm.utils.errors import UserError
from internlm.utils.json_files import write_json
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

# Texts on which the written tokenizer must agree with sentencepiece: blanks, line ends, digits, scripts, unknown bytes.
_PROBES = (
    "Hello, world!",
    "  two  blanks\n\n\tand a tab ",
    "def f(x):\n    return x ** 2 + 3.14159\n",
    "书生·浦语 是一个语言模型。",
    "two\r\nlines",
    "naïve Ünïcödé ﬁ ½ Ａ \u00a0 \u3000 🦙 \u0378",
    "\na \u00a0",
    "e\u0301\u0302 \u1112\u1161 \u2028\u0085",  # marks that compose, line ends of Unicode
)


def read_proto(processor: SentencePieceProcessor) -> Any:
    """The sentencepiece model as a message of protobuf. Raises UserError where tokenizer.json can't be made of it."""
    try:
        sentencepiece_model_pb2 = import_module("sentencepiece.sentencepiece_model_pb2")  # needs protobuf
        import_module("tokenizers")
    except ImportError as error:
        raise UserError(
            f"writing tokenizer.json needs a package that is missing ({error.name}): "
            'pip install "internlm[export]", or give a Hugging Face folder as the tokenizer'
        ) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    trainer = proto.trainer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise UserError("only BPE and unigram sentencepiece models can be exported, not word or char models")
    if trainer.treat_whitespace_as_suffix:
        raise UserError(
            "a sentencepiece model with treat_whitespace_as_suffix cannot be exported: tokenizer.json has blanks in "
            "front of words; give a Hugging Face folder as the tokenizer"
        )
    return proto


def write_fast_tokenizer(
    processor: SentencePieceProcessor, file: Path, renamed: dict[str, str], marks: set[str]
) -> None:
    """The sentencepiece model as tokenizer.json. `renamed` pieces get other names; they and `marks` become special."""
    proto = read_proto(processor)
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer(_algorithm(proto))
    tokenizer.normalizer, tokenizer.decoder = _normaliser(proto.normalizer_spec), _decoder(proto.normalizer_spec)
    kinds = proto.SentencePiece
    for piece in proto.pieces:
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED):
            special = piece.type != kinds.USER_DEFINED or piece.piece in marks
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    if processor.bos_id() >= 0:
        bos = processor.id_to_piece(processor.bos_id())
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, processor.bos_id())]
        )
    inside = (f"a{piece.piece}b" for piece in proto.pieces if piece.type == kinds.USER_DEFINED)
    plain = [text for text in inside if not is_control_like(text[1:-1])]  # of the others see data/tokenizer.py
    probes = [*_PROBES, *plain[:64]]
    differing = [t for t in probes if tokenizer.encode(t, add_special_tokens=False).ids != processor.encode(t)]
    if differing:
        logger.warning(
            f"tokenizer.json and tokenizer.model differ on {differing}: this sentencepiece model uses features "
            "that tokenizer.json cannot express; prefer tokenizer.model"
        )
    write_json(file, _with_names(json.loads(tokenizer.to_str()), renamed))


def _with_names(about: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """tokenizer.json with other names for some pieces."""
    vocab = about["model"]["vocab"]
    if isinstance(vocab, list):
        ids = {piece: index for index, (piece, _) in enumerate(vocab)}
        about["model"]["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    else:
        ids = vocab
        about["model"]["vocab"] = {renamed.get(piece, piece): index for piece, index in vocab.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = [{"id": ids[piece], "content": name, **flags} for piece, name in renamed.items()]
    kept = [token for token in about["added_tokens"] if token["content"] not in renamed]
    about["added_tokens"] = sorted([*kept, *new], key=lambda token: token["id"])
    return about


def _algorithm(proto: Any) -> Any:
    """BPE or unigram model of `tokenizers` with the pieces' ids."""
    from tokenizers import models

    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type == trainer.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    # sentencepiece merges whatever neighbours form a piece, best score first; `tokenizers` wants the pairs listed.
    normal = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    splits = (
        (-score, vocab[text[:cut]], vocab[text[cut:]], (text[:cut], text[cut:]))
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    )
    return models.BPE(
        vocab,
        [pair for *_, pair in sorted(splits)],
        unk_token=pieces[trainer.unk_id].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normaliser(spec: Any) -> Any:
    """What sentencepiece does to a text before it looks for pieces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), "") for pattern in (r"\A +", r" +\z")]  # blanks only
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)
