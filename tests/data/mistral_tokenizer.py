"""The real 32,000-piece tokenizer of Mistral-7B-v0.1 and Mixtral, from `mistral-common`.

As a program it writes a tokenizer folder: `python tests/data/mistral_tokenizer.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

TEMPLATE = Path(__file__).parent / "chat_templates" / "mistral.jinja"


def mistral_tokenizer():
    """A fast tokenizer with a chat template, from the SentencePiece model without protobuf.

    A pair of pieces is merged if the two together are a piece, the likelier piece first.
    """
    import mistral_common
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    folder = Path(mistral_common.__file__).parent / "data"
    model = SentencePieceProcessor(str(folder / "tokenizer.model.v1"))
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = []
    for piece, number in ids.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(model.get_score(number), pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = LlamaTokenizer(vocab=ids, merges=[pair for _, pair in merges])
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


if __name__ == "__main__":
    mistral_tokenizer().save_pretrained(sys.argv[1])
