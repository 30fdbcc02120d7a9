"""Tar files of WebDataset: recordings with the speaker of each beside it."""

import os
from pathlib import Path

from corpus.tars import is_shard, recordings_of, shards_of
from preparation.corpora import Corpus, FolderNames, Reading, Utterance, as_folder
from preparation.tables import described, place_in


def is_webdataset(path: Path) -> bool:
    """Whether there are tar files whose recordings have their speaker beside them, in KEY.json or KEY.spk."""
    shards = shards_of(path)
    return bool(shards) and all(map(is_shard, shards))


def read_webdataset(path: Path, reading: Reading) -> Corpus:
    """The members of all shards; the folders between the speaker's and the file are the session."""
    utterances, shards, people = [], shards_of(path), FolderNames()
    for speakers, files, _, shard in recordings_of(path):
        for named, file, member in zip(speakers, files, shard.names):
            speaker = people.of(named)
            name = "/".join(map(as_folder, member.split(os.sep)))
            utterances.append(Utterance(file, speaker, *place_in(name, speaker, name)))
    return described("webdataset", path, "tar files of WebDataset" if len(shards) > 1 else "WebDataset", utterances)
