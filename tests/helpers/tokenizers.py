"""A small tokenizer of every kind that checkpoints have, made on the spot."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = [PAD, BOS, EOS]
LETTERS = "0123456789QAabcdexyz+=?:[]."


def _wrapped(backend: Tokenizer, around: str | None) -> PreTrainedTokenizerBase:
    if around is not None:
        used = [(name, i) for i, name in enumerate(SPECIAL) if name in around]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def bytes_of_text(around: str | None = None, *, is_spaced: bool = False) -> PreTrainedTokenizerBase:
    """Byte-level BPE with merges that may cross the end of a prompt, as GPT-2, Llama 3 and Qwen."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("a", "b"), ("ab", "c"), ("\u0120", "x"), ("\u0120", "8"), ("=", "="), ("2", "4")]
    names += ["".join(pair) for pair in merges]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=is_spaced)
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend, around)


def pieces(
    around: str | None = None, *, prepend: str = "first", has_bytes: bool = True
) -> PreTrainedTokenizerBase:
    """SentencePiece as its fast form: a text begins with a space that decoding takes off again."""
    names = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256) if has_bytes), "\u2581"]
    names += [*LETTERS, *(f"\u2581{c}" for c in "Q8+x"), *([] if has_bytes else ["\n"])]
    merges = [("\u2581", c) for c in "Q8+x"]
    model = models.BPE(
        {name: i for i, name in enumerate(names)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    used = None
    if around is not None:
        used = [(name, i + 1) for i, name in enumerate(SPECIAL) if name in around]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
    )


def llama() -> PreTrainedTokenizerBase:
    """Llama 2's own class."""
    names = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    names += [*LETTERS, *(f"\u2581{c}" for c in "Q8+x")]
    merges = [("\u2581", c) for c in "Q8+x"]
    return LlamaTokenizer(vocab={p: i for i, p in enumerate(names)}, merges=merges)


def words(around: str | None = None) -> PreTrainedTokenizerBase:
    """One token a word: spaces are lost."""
    names = [*SPECIAL, "<unk>", *LETTERS, "is", "of", "the", "24", "sum", "88"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(backend, around)


def word_pieces() -> PreTrainedTokenizerBase:
    """WordPiece in lower case, as BERT."""
    names = [*SPECIAL, "[UNK]", *LETTERS.lower(), *(f"##{c}" for c in LETTERS.lower())]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _wrapped(backend, f"{BOS} $A {EOS}")


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": bytes_of_text,
    "bytes, BOS": lambda: bytes_of_text(f"{BOS} $A"),
    "bytes, EOS": lambda: bytes_of_text(f"$A {EOS}"),
    "bytes, both": lambda: bytes_of_text(f"{BOS} $A {EOS}"),
    "bytes, spaced": lambda: bytes_of_text(f"{BOS} $A", is_spaced=True),
    "pieces": pieces,
    "pieces, BOS": lambda: pieces(f"{BOS} $A"),
    "pieces, both": lambda: pieces(f"{BOS} $A {EOS}"),
    "pieces, unspaced": lambda: pieces(f"{BOS} $A", prepend="never"),
    "pieces, no bytes": lambda: pieces(f"{BOS} $A", has_bytes=False),
    "llama": llama,
    "words": lambda: words(f"{BOS} $A"),
    "word pieces": word_pieces,
}
