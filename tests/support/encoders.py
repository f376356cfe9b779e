"""Encoders for tests: no weights to download."""

from __future__ import annotations

from pathlib import Path


def random_encoder(folder: Path) -> Path:
    """A small sentence-transformers model of random weights, saved as such models are."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *[f"word{i}" for i in range(1200)]])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    plain = folder.with_name("bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(plain)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(plain)
    bert = modules.Transformer(str(plain))
    SentenceTransformer(modules=[bert, modules.Pooling(64), modules.Normalize()], device="cpu").save(str(folder))
    return folder
