"""Text corpus and synthetic recall data for the tiny test model.

The corpus is two public-domain translations of one book collection, taken from
Debian packages by the command line tools those packages ship:

* World English Bible   packages ``sword-text-web`` and ``diatheke``
* King James Version    packages ``bible-kjv`` and ``bible-kjv-text``

``python data.py --data DIR --tests DIR`` writes ``train.txt`` and ``heldout.txt``
for training and, for the tests, ``heldout.txt`` and ``recall.txt``.
"""

import argparse
import random
import re
import subprocess
from pathlib import Path

BOS, EOS, UNK, VOCAB = 257, 258, 256, 259

# Whole books kept out of the training text, in both translations.  These two
# were chosen because no other book repeats their chapters (as the gospels or
# the books of kings and chronicles do among themselves).
HELD_OUT_WEB = ("Judges", "Ruth")
HELD_OUT_KJV = ("Jdgs", "Ruth")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEY_LEN, VALUE_LEN = 2, 3

TYPOGRAPHIC = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--"}


# --------------------------------------------------------------------------
# Corpus
# --------------------------------------------------------------------------

def _run(command):
    """Return the standard output of a command as text."""
    return subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8")


def _tidy(text):
    """Plain ASCII with single spaces: one byte per character, no rare bytes."""
    for fancy, plain in TYPOGRAPHIC.items():
        text = text.replace(fancy, plain)
    text = text.encode("ascii", "ignore").decode("ascii")
    return re.sub(r"\s+", " ", text).strip()


def _chapters(verses):
    """Join (book, chapter, text) verses into {book: [chapter text, ...]}."""
    books = {}
    for book, chapter, text in verses:
        books.setdefault(book, {}).setdefault(chapter, []).append(text)
    return {b: [" ".join(v) for v in c.values()] for b, c in books.items()}


def load_web():
    """World English Bible as {book: [chapter, ...]}.

    The marked-up output is used because the plain one loses the blank where a
    footnote stood; in the markup a word boundary is still visible.
    """
    raw = _run(["diatheke", "-b", "engWEB2015eb", "-f", "OSIS",
                "-k", "Genesis 1:1-Revelation 22:20"])
    verses = []
    for line in raw.splitlines():
        match = re.search(r"((?:I+ )?[A-Z][A-Za-z() ]*?) (\d+):\d+:(.*)", line)
        if not match:
            continue
        book, chapter, text = match.groups()
        text = re.sub(r"(</w>|[,.;:!?])<w", r"\1 <w", text)
        text = _tidy(re.sub(r"<[^>]*>", "", text))
        if text:
            verses.append((book.strip(), int(chapter), text))
    return _chapters(verses)


def load_kjv():
    """King James Version as {book: [chapter, ...]}."""
    verses = []
    for line in _run(["bible", "-f", "gen1:1-rev22:21"]).splitlines():
        match = re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line)
        if match:
            verses.append((match[1], int(match[2]), _tidy(match[3])))
    return _chapters(verses)


def collect():
    """Return (training text, held-out text); chapters are lines."""
    web, kjv = load_web(), load_kjv()
    held = [web.pop(book) for book in HELD_OUT_WEB]
    for book in HELD_OUT_KJV:
        kjv.pop(book)
    join = lambda chapters: "\n".join(chapters) + "\n"
    train = "\n".join(join(c) for books in (kjv, web) for c in books.values())
    return train, "\n".join(join(c) for c in held)


# --------------------------------------------------------------------------
# Recall sequences
# --------------------------------------------------------------------------

def make_pairs(rng, count):
    """``count`` distinct keys with random values, as (key, value) strings."""
    keys = set()
    while len(keys) < count:
        keys.add("".join(rng.choice(LETTERS) for _ in range(KEY_LEN)))
    keys = sorted(keys)
    rng.shuffle(keys)
    return [(k, "".join(rng.choice("0123456789") for _ in range(VALUE_LEN))) for k in keys]


def take_filler(rng, text, length):
    """A random stretch of ``text``, on one line and starting with a word."""
    start = rng.randrange(len(text) - length - 200)
    start = text.index(" ", start) + 1
    return text[start:start + length].replace("\n", " ")


def weave(rng, filler, inserts):
    """Split ``filler`` at random word starts: [chunk, insert, chunk, ...].

    ``inserts`` keep their order; returns a list of (is_insert, item).
    """
    spaces = [i + 1 for i, c in enumerate(filler) if c == " "] or [0]
    cuts = sorted(rng.choice(spaces) for _ in inserts)
    parts, last = [], 0
    for cut, item in zip(cuts, inserts):
        parts += [(False, filler[last:cut]), (True, item)]
        last = cut
    return parts + [(False, filler[last:])]


def eval_prompt(rng, text, length, pairs_count):
    """One prompt in the form the tests use, and its answer.

    ``pairs_count`` items ``key=value;`` stand between words of running text and
    the prompt ends with ``?key=`` for one of the keys.
    """
    pairs = make_pairs(rng, pairs_count)
    key, value = rng.choice(pairs)
    items = [f"{k}={v}; " for k, v in pairs]
    query = f"?{key}="
    filler = take_filler(rng, text, length - sum(map(len, items)) - len(query))
    body = "".join(item for _, item in weave(rng, filler, items))
    return body + query, value


class RecallMaker:
    """Training sequences for in-context recall, with per-byte loss weights."""

    def __init__(self, text, answer_weight=6.0):
        self.text = text
        self.answer_weight = answer_weight

    def _pair(self, pair, end):
        # Key and value are random, so predicting them would only add noise.
        key, value = pair
        return f"{key}={value};{end}", [0.0] * KEY_LEN + [1.0] + [0.0] * VALUE_LEN + \
            [1.0] * (1 + len(end))

    def _query(self, pair, end):
        key, value = pair
        answer = [self.answer_weight] * (VALUE_LEN + 1)
        return f"?{key}={value};{end}", [0.0] * (KEY_LEN + 1) + [1.0] + answer + [1.0] * len(end)

    def sequence(self, rng, length, filler_share):
        """Return (bytes, weights), each exactly ``length`` long.

        ``filler_share`` is the part of the sequence that is running text; the
        rest is pairs, then questions, a third of them inside the text.
        """
        filler_len = int(length * filler_share)
        item = KEY_LEN + VALUE_LEN + 3
        room = max(3, (length - filler_len) // item)
        pairs = make_pairs(rng, rng.randint(max(2, min(6, room // 3)), max(3, min(26, room // 2))))
        inner, known = [], []
        for pair in pairs:
            known.append(pair)
            inner.append(self._pair(pair, " "))
            if filler_len and rng.random() < 0.35:
                inner.append(self._query(rng.choice(known), " "))
        parts = []
        filler = take_filler(rng, self.text, filler_len) if filler_len else ""
        for is_insert, piece in weave(rng, filler, inner):
            parts.append(piece if is_insert else (piece, [1.0] * len(piece)))
        # The loss on plain text is weighted 1, so that one number trades both.
        # A question straight after the text is the form of the final test.
        text, weights = "", []
        tail = length - sum(len(t) for t, _ in parts)
        while tail > 0:
            parts.append(self._query(rng.choice(pairs), ""))
            tail -= len(parts[-1][0])
        for piece, weight in parts:
            text += piece
            weights += weight
        return text[:length].encode("ascii"), weights[:length]


# --------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------

def write_recall(path, text, count=200, seed=20240601):
    """Write ``count`` lines of prompt TAB answer, 1000 to 2000 bytes each."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        prompt, answer = eval_prompt(rng, text, rng.randint(1000, 2000), rng.randint(8, 24))
        lines.append(f"{prompt}\t{answer}\n")
    Path(path).write_text("".join(lines), encoding="ascii")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="where train.txt and a copy of heldout.txt go")
    parser.add_argument("--tests", required=True, type=Path,
                        help="where heldout.txt and recall.txt go")
    args = parser.parse_args()
    train, held = collect()
    args.data.mkdir(parents=True, exist_ok=True)
    (args.data / "train.txt").write_text(train, encoding="ascii")
    for folder in (args.data, args.tests):
        (folder / "heldout.txt").write_text(held, encoding="ascii")
    write_recall(args.tests / "recall.txt", held)
    print(f"train {len(train)} bytes, held out {len(held)} bytes")


if __name__ == "__main__":
    main()
