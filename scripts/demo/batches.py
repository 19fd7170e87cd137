"""Turns generated documents into rows of token ids and loss weights."""

import random

import numpy as np
import sentencepiece
import torch

import corpus

BOS, EOS = 1, 2


class Encoder:
    def __init__(self, path):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.space = self.sp.piece_to_id("\u2581")
        # Characters of text that a piece stands for; the corpus is ASCII, so a byte is a character.
        self.lengths = np.array([1 if self.sp.is_byte(i) else len(self.sp.id_to_piece(i))
                                 for i in range(self.sp.vocab_size())])

    def ids(self, text):
        return [BOS, *self.sp.encode(text)]

    def document(self, parts, rng):
        """[(text, weight)] -> (ids, weights) with <s> and </s>; a token weighs what its last character does."""
        text = corpus.plain(parts)
        ids = self.sp.encode(text)
        if ids[:1] == [self.space] and text[0] == "<" and rng.random() < 0.5:
            ids = ids[1:]  # chats also without the lone space mark that comes before the first tag
            start = 0
        else:
            start = -1  # the dummy space stands for no character
        ends = start + np.cumsum(self.lengths[ids])
        per_char = np.repeat([w for _, w in parts], [len(t) for t, _ in parts])
        assert ends[-1] == len(text), (text, ends[-1], len(text))
        weights = per_char[np.maximum(ends - 1, 0)]
        return [BOS, *ids, EOS], [0.0, *weights, 1.0]


def row(encoder, rng, length, recall_share, mix):
    """One row of length + 1 tokens: perhaps a recall document, then documents of `mix` until full."""
    ids, weights = [], []
    if rng.random() < recall_share:
        size = int(length * 1.04) if rng.random() < 0.6 else int(length * rng.uniform(0.4, 1.0))
        ids, weights = encoder.document(corpus.recall(rng, size), rng)
    while len(ids) < length + 1:
        more_ids, more_weights = encoder.document(corpus.document(rng, length, mix), rng)
        ids += more_ids
        weights += more_weights
    return ids[:length + 1], weights[:length + 1]


def batch(encoder, seed, step, length, rows, recall_share, mix):
    """ids (rows, length + 1), weights (rows, length); the same for the same seed and step."""
    rng = random.Random(f"batch {seed} {step}")
    drawn = [row(encoder, rng, length, recall_share, mix) for _ in range(rows)]
    return torch.tensor([ids for ids, _ in drawn]), torch.tensor(np.array([w[1:] for _, w in drawn]), dtype=torch.float32)
