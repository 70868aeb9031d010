#!/usr/bin/env bash
# tokenizers 0.23.3: decoding one token more can take characters away that were whole.
#
# The ByteFallback decoder (Llama 2, Gemma, Mistral and every other SentencePiece tokenizer in its
# fast form) joins neighbouring byte tokens and decodes them together. If the last character of such
# a run is not whole, every byte of the run becomes U+FFFD, also those of whole characters before.
# So the text of a sequence is no prefix of the text of the same sequence with one token more, and a
# completion that was cut inside a character loses the characters in front of it as well. A decoder
# of byte-level BPE (GPT-2, Llama 3, Qwen) keeps the whole ones.
#
# What follows for streaming and for offsets of tokens: never count on decode(ids[:k]); keep the
# characters that were whole once.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
"$place/venv/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print("tokenizers", tokenizers.__version__)
vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
fallback = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
names = sorted(pre_tokenizers.ByteLevel.alphabet())
level = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
level.decoder = decoders.ByteLevel()

found = {}
for kind, tokenizer in (("ByteFallback", fallback), ("ByteLevel", level)):
    ids = tokenizer.encode("\u6f22\u5b57").ids
    assert len(ids) == 6, ids
    found[kind] = [tokenizer.decode(ids[:k]) for k in range(1, 7)]
    for k, text in enumerate(found[kind], 1):
        print(f"{kind:12} {k} of 6 byte tokens: {text.encode('unicode_escape').decode()}")

bad = "\ufffd"
assert found["ByteFallback"][2] == "\u6f22"
assert found["ByteFallback"][3] == bad * 4, "changed: whole characters are kept now"
assert found["ByteFallback"][4] == bad * 5
assert found["ByteFallback"][5] == "\u6f22\u5b57"
assert found["ByteLevel"][3].startswith("\u6f22")
PYTHON
