"""Turns generated documents into rows of token ids and loss weights."""

import random

import numpy as np
import sentencepiece
import torch
import torch.utils.data

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


def recall_document(rng, length):
    """A recall document for the start of a row of `length` tokens: mostly as long as the row, else shorter."""
    whole = rng.random() < 0.6
    if rng.random() < 0.5:
        return corpus.exam(rng, length - rng.randrange(0, 48) if whole else int(length * rng.uniform(0.1, 1.0)))
    return corpus.recall(rng, int(length * (1.04 if whole else rng.uniform(0.4, 1.0))))


def row(encoder, rng, length, recall_share, mix):
    """One row of length + 1 tokens: perhaps a recall document, then documents of `mix` until full."""
    ids, weights = [], []
    if rng.random() < recall_share:
        ids, weights = encoder.document(recall_document(rng, length), rng)
    while len(ids) < length + 1:
        more_ids, more_weights = encoder.document(corpus.document(rng, length, mix), rng)
        ids += more_ids
        weights += more_weights
    return ids[:length + 1], weights[1:length + 1]


def batch(encoder, seed, step, length, rows, recall_share, mix):
    """ids (rows, length + 1) int16, weights (rows, length) float16; the same for the same seed and step."""
    rng = random.Random(f"batch {seed} {step}")
    ids, weights = zip(*[row(encoder, rng, length, recall_share, mix) for _ in range(rows)])
    return torch.from_numpy(np.array(ids, np.int16)), torch.from_numpy(np.array(weights, np.float16))


class Steps(torch.utils.data.Dataset):
    """The batches of a stage of training by number of the step, without end."""

    def __init__(self, encoder, seed, stage, rows):
        self.encoder, self.seed, self.stage, self.rows = encoder, seed, stage, rows

    def __len__(self):
        return 1 << 30

    def __getitem__(self, step):
        stage = self.stage
        return batch(self.encoder, self.seed, step, stage.length, self.rows, stage.recall, stage.mix)


def stream(encoder, seed, stage, rows, workers, pin):
    """Iterator over a stage's batches of `rows` rows, made ahead and in order by `workers` processes."""
    return iter(torch.utils.data.DataLoader(Steps(encoder, seed, stage, rows), batch_size=None, num_workers=workers,
                                            prefetch_factor=4, pin_memory=pin))
