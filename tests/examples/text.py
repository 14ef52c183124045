"""Texts of different lengths in two classes: padded, with a mask that hides the padding.

dist-train --task=tests/examples/text.py:task --optimizer=adam --learning_rate=0.01
"""

import keras
import numpy as np

import dist_train

GOOD, BAD = ("fine", "great", "lovely", "superb"), ("dull", "awful", "poor", "boring")
NEUTRAL = ("the", "film", "plot", "a", "was", "and", "scene", "actor", "long", "music")
LONGEST = 24
NUMBERS = {word: number for number, word in enumerate(GOOD + BAD + NEUTRAL, start=1)}


def reviews(count, seed):
    """([n] texts of 4 to 24 words, [n] labels 0 or 1); a few words tell, the others do not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    texts = []
    for label in labels:
        words = rng.choice(NEUTRAL, rng.integers(3, LONGEST - 1)).tolist()
        for word in rng.choice(GOOD if label else BAD, rng.integers(1, 3)):
            words.insert(int(rng.integers(0, len(words) + 1)), word)
        texts.append(" ".join(words[:LONGEST]))
    return texts, labels


def padded(texts):
    """[n, LONGEST] int32: a number from 1 on for each word, then zeros."""
    numbers = [[NUMBERS[word] for word in text.split()] for text in texts]
    return keras.utils.pad_sequences(numbers, maxlen=LONGEST, padding="post")


def model():
    return keras.Sequential(
        [
            keras.Input((LONGEST,), dtype="int32"),
            keras.layers.Embedding(len(NUMBERS) + 1, 8, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),  # of the words that are there
            keras.layers.Dense(2),
        ]
    )


def task():
    (texts, labels), (new_texts, new_labels) = reviews(3000, seed=0), reviews(500, seed=1)
    return dist_train.Task(
        model=model,
        train=dist_train.Arrays(padded(texts), labels),
        test=dist_train.Arrays(padded(new_texts), new_labels),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics={"accuracy": keras.metrics.sparse_categorical_accuracy},
    )
