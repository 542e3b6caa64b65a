"""One passage id, one content: what a set of passages must keep, since passages with one id count as the same."""

import random
from collections.abc import Hashable, Mapping
from typing import Any

MOST_STREAMED_IDS = 2**18  # that a stream remembers: about 70 MB


class PassageContents:
    """
    The content of each passage id of a set, to find an id that has two.

    Args:
        most (`int`, *optional*): ids to remember, for streams. A further id takes the place of a random one, so that
            two contents of an id are found sooner or later, however far apart they are.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._first: dict[str, tuple[int, str]] = {}  # hash of the content, and its place
        self._ids: list[str] = []  # of a stream: those that are remembered
        self._rng = random.Random(0)

    def __contains__(self, id: str) -> bool:
        return id in self._first

    def ids(self) -> list[str]:
        """Return the ids that are remembered."""
        return list(self._first)

    def add(self, id: str, content: Hashable, where: str) -> None:
        """
        Remember the content of a passage: title and text, or token ids.

        Raises:
            `ValueError`: if the same id had another content, naming both places.
        """
        content_hash = hash(content)
        first = self._first.get(id)
        if first is None:
            if self.most is not None:
                self._make_room(id, self.most)
            self._first[id] = content_hash, where
            return
        if first[0] != content_hash:
            raise ValueError(
                f"{where}: the passage id {id!r} has another title or text than in {first[1]}. Passages with one id"
                " count as the same: give each its own, or leave ids out."
            )

    def _make_room(self, id: str, most: int) -> None:
        """Let an id take the place of a random one if `most` are remembered."""
        if len(self._ids) < most:
            self._ids.append(id)
            return
        i = self._rng.randrange(most)
        del self._first[self._ids[i]]
        self._ids[i] = id

    def add_instance(self, instance: Mapping[str, Any], where: str) -> None:
        """Remember the passages and hard negatives of a checked training instance; see [`PassageContents.add`]."""
        for segment in instance["segments"]:
            passages = list(segment["negatives"])
            if segment["passage"] is not None:
                passages.insert(0, segment["passage"])
            for passage in passages:
                self.add(passage["id"], (passage["title"], passage["text"]), where)
