"""Makes goldens/gguf/tokenizers: small tokenizers as GGUF files hold them, and what the originals make of some texts.

Run: python gguf_tokenizers.py PATH/tinyshakespeare.txt

A byte-level BPE is trained for each way of cutting texts that our families have, with the pre-tokenizer of the published
tokenizer.json of its name, and one of SentencePiece with byte fallback. `<name>.gguf` has the keys that llama.cpp's converter
writes, and no tensors; `<name>.json` the texts, and the ids with and without special tokens that `tokenizers`, or
sentencepiece, gives for them.
"""

import importlib.metadata
import json
import pathlib
import sys
import tempfile

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "gguf" / "tokenizers"
VERSION = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tokenizers", "sentencepiece", "gguf"))
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = [
    "ROMEO:\nWhat light through yonder window breaks?\n\nIt is the east, and Juliet is the sun.",
    "I'll, I'LL, we've, THEY'RE; o'er 'tis the king's crown -- 'twas (1, 22, 333, 4444 and 55555.5) $1,000,000!?",
    "def f(x):\n    return  x[0:10] ** 2\t# done\r\n\r\n\n   \n  end   ",
    "na\u00efve caf\u00e9 e\u0301 \u2014 \u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \U0001f389\U0001f1e9\U0001f1ea \u00bd \u0663\u0664 \u01c5 \u00a0x",
    "Hello world<|endoftext|>ROMEO: helloWorld HTTPServer XMLHttpRequest aB",
    " leading and trailing ",
    "",
]


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


# Name in llama.cpp: normalizer, pre-tokenizer, whether whole words come before merges, whether texts begin with a token.
WAYS = {
    "gpt-2": (None, GPT2, False, False),
    "mpt": (normalizers.NFC(), GPT2, False, False),
    "llama-bpe": (None, split(CONTRACTIONS + r"\p{N}{1,3}" + TAIL), True, True),
    "dbrx": (None, split(CONTRACTIONS + r"\p{N}{1,3}" + TAIL), False, False),
    "qwen2": (normalizers.NFC(), split(CONTRACTIONS + r"\p{N}" + TAIL), False, False),
    "tekken": (None, split(TEKKEN), True, True),
    "refact": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False, False),
    "falcon": (None, pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"), GPT2, pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]), False, False),
}


def write(name, keys, answers, producer):
    writer = gguf.GGUFWriter(FOLDER / f"{name}.gguf", "mamba")
    keys(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    head = {"producer": f"{producer}, gguf", "producer_version": VERSION, "seed": "none"}
    lines = ",\n".join(json.dumps(answer) for answer in answers)
    (FOLDER / f"{name}.json").write_text(f'{json.dumps(head)[:-1]}, "texts": [\n{lines}\n]}}\n')
    lengths = [len(answer["ids"]) for answer in answers]
    print(f"{name}: {(FOLDER / f'{name}.gguf').stat().st_size} bytes, {lengths} ids")


def byte_level(name, text):
    normalizer, cut, ignore_merges, add_bos = WAYS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|bos|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text[i : i + 1000] for i in range(0, 200_000, 1000)] + TEXTS * 3, trainer)
    if ignore_merges:
        # A word that no merges lead to.
        state = json.loads(tokenizer.to_str())
        state["model"]["vocab"]["\u0120yonder"] = tokenizer.get_vocab_size()
        tokenizer = Tokenizer.from_str(json.dumps(state))
    # As GPT-NeoX has them: runs of spaces, found before all else.
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (4, 3, 2)])
    bos = tokenizer.token_to_id("<|bos|>")
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B",
                                                                 special_tokens=[("<|bos|>", bos)])
    vocab = {id: token for token, id in tokenizer.get_vocab().items()}
    added = {id: token for id, token in tokenizer.get_added_tokens_decoder().items()}
    tokens = [vocab[id] for id in range(len(vocab))]
    kind = lambda id: gguf.TokenType.NORMAL if id not in added else (  # noqa: E731
        gguf.TokenType.CONTROL if added[id].special else gguf.TokenType.USER_DEFINED)

    def keys(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        # Filled up, as the converter does it.
        writer.add_token_list(tokens + ["[PAD0]", "[PAD1]"])
        writer.add_token_types([kind(id) for id in range(len(tokens))] + [gguf.TokenType.UNUSED] * 2)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(bos)
        writer.add_eos_token_id(0)

    encode = lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids  # noqa: E731
    answers = [{"text": text, "ids": encode(text, True), "bare": encode(text, False), "decoded": tokenizer.decode(encode(text, False))}
               for text in TEXTS]
    write(name, keys, answers, "tokenizers")
    return tokenizer


def sentence_piece(text):
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "text.txt").write_text(text[:200_000])
        sentencepiece.SentencePieceTrainer.train(
            input=str(scratch / "text.txt"), model_prefix=str(scratch / "m"), model_type="bpe", vocab_size=700, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
            unk_id=0, bos_id=1, eos_id=2, minloglevel=2)
        model = sentencepiece.SentencePieceProcessor(str(scratch / "m.model"))
    kinds = []
    for id in range(model.get_piece_size()):
        kinds.append(gguf.TokenType.UNKNOWN if model.is_unknown(id) else gguf.TokenType.CONTROL if model.is_control(id)
                     else gguf.TokenType.BYTE if model.is_byte(id) else gguf.TokenType.NORMAL)

    def keys(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(id) for id in range(len(kinds))])
        writer.add_token_scores([model.get_score(id) for id in range(len(kinds))])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    # sentencepiece has no special tokens within texts: that is another convention.
    texts = [text for text in TEXTS if "<|" not in text]
    answers = [{"text": text, "ids": [1] + model.encode(text), "bare": model.encode(text), "decoded": model.decode(model.encode(text))}
               for text in texts]
    write("llama", keys, answers, "sentencepiece")


def main():
    text = pathlib.Path(sys.argv[1]).read_text()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in WAYS:
        byte_level(name, text)
    sentence_piece(text)


if __name__ == "__main__":
    main()
