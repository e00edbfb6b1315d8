"""A tokenizer for models that come with none: every token is a word of a given vocabulary, or its own number.

    a vocabulary      every character of a text is the token of that name; where some token has several characters,
                      words between spaces are
    none              a text is numbers between spaces: `12 5 7` are the tokens 12, 5 and 7

So prompts of token ids, tables and pages read and show tokens as they do text. A text with anything else in it has no
tokens: `LoadedModel.encode` says so.
"""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae.errors import InputError


def word_tokenizer(vocabulary: Sequence[str] | None, d_vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `d_vocab` tokens; see the module's description.

    Args:
        vocabulary: text of every token, in the order of their ids; None for numbers.

    Raises:
        InputError: a vocabulary of another size, or one with a token twice or empty.
    """
    words = [str(token) for token in range(d_vocab)] if vocabulary is None else list(vocabulary)
    if len(words) != d_vocab:
        raise InputError(f"the vocabulary has {len(words)} tokens, the model {d_vocab}: name every one, in order")
    if len(set(words)) != len(words) or not all(words):
        twice = next(word for word in words if words.count(word) > 1 or not word)
        raise InputError(f"the vocabulary has the token {twice!r} twice or empty: every token needs a name of its own")
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=""))
    if vocabulary is not None and all(len(word) == 1 for word in words):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
