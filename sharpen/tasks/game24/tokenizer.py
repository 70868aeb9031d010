"""The tokenizer of the shipped model: one token per number 0..200, operator, word and newline."""

from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .puzzles import MAX_NUMBER

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ["\n", "Numbers:", "Target:", "left:", "+", "-", "*", "/", "="]
MAX_LENGTH = 1024


class SpecialIds(NamedTuple):
    """Ids of the special tokens that a model's configuration names."""

    pad: int
    bos: int
    eos: int


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The special ids of a tokenizer made by `build_tokenizer`."""
    vocab = tokenizer.get_vocab()
    return SpecialIds(*(vocab[SPECIAL[f"{name}_token"]] for name in SpecialIds._fields))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that decodes a trace to exactly the text it was encoded from."""
    words = [*SPECIAL.values(), *WORDS, *map(str, range(MAX_NUMBER + 1))]
    vocab = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    # tokens are joined by spaces, then the spaces around a newline are taken away again
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\x00", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
        ]
    )
    bos = SPECIAL["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )
