"""What transformers wants beside a `tokenizer.json`: which class reads it, and which tokens are special."""

from __future__ import annotations

import json

from megalm.data.tokenizer import FILE_NAME, Tokenizer


def tokenizer_files(tokenizer: Tokenizer | None, longest: int) -> dict[str, bytes]:
    """Return the files' texts by name; none without a tokenizer. The end of text begins documents too."""
    if tokenizer is None:
        return {}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.end_token)
    about = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    return {
        FILE_NAME: tokenizer.serialized,
        "tokenizer_config.json": (json.dumps(about, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(special, indent=2) + "\n").encode(),
    }
