# /// script
# requires-python = ">=3.11"
#
# [tool.grid]
# files = ["{stdlib}/**/*.py", "{stdlib}/**/*.txt"]
# ///
"""Count the words of a folder of text on the grid and print the 20 commonest.

    python examples/wordcount.py                                  # this machine alone: Python's own library, tens of MB
    grid submit examples/wordcount.py                             # the same on all machines of the grid
    grid submit --file ~/texts examples/wordcount.py ~/texts      # another folder: it travels to the machines that lack it
    python examples/wordcount.py --serial                         # one process, no grid: to compare

A word is a run of letters, digits and underscores, in lower case. Every file ending in .py or .txt counts; with --all every file.
"""

import argparse
import os
import re
from collections import Counter

import grid

WORD = re.compile(rb"[A-Za-z0-9_]+")
BATCH_BYTES = 2 << 20  # files of a task together: long enough to be worth its messages, short enough to share out well


def count(files):
    """The words of some files."""
    words = Counter()
    for file in files:
        words.update(WORD.findall(file.read_bytes().lower()))
    return words


def batches(files):
    """Neighbouring files, BATCH_BYTES together."""
    batch, size = [], 0
    for file in files:
        batch.append(file)
        size += file.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def main():
    parser = argparse.ArgumentParser(description="count words")
    parser.add_argument("folder", nargs="?", default="{stdlib}", help="default: Python's own library")
    parser.add_argument("--all", action="store_true", help="every file, not only .py and .txt")
    parser.add_argument("--serial", action="store_true", help="without the grid, to compare")
    options = parser.parse_args()
    endings = ("",) if options.all else (".py", ".txt")
    files = [file for file in grid.files(os.path.expanduser(options.folder)) if file.name.endswith(endings)]
    total = Counter()
    for words in map(count, batches(files)) if options.serial else grid.map_unordered(count, batches(files)):
        total.update(words)
    for word, times in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:20]:
        print(f"{times:9,}  {word.decode()}")
    print(f"{total.total():,} words, {len(total):,} different, in {len(files):,} files")


if __name__ == "__main__":
    main()
