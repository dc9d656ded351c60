"""The demo's tokenizer: byte-level BPE, trained on the demo's rows."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def train_tokenizer(
    texts: Iterable[str], *, fixed: Iterable[str] = (), size: int = 1024
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer of at most `size` tokens besides `fixed`.

    END ends a text and pads a batch. fixed: strings that become one token each wherever they occur; without
    them, most of what a small model reads would be the words that every prompt begins with.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(text, normalized=False) for text in fixed])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=128)
