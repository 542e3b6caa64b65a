"""A question to a model, with its settings."""

from dataclasses import dataclass

MAX_QUESTION = 2000  # characters
MAX_RETRIEVALS = 16  # per answer: a model that never stops retrieving must not keep other users waiting
AUTOMATIC, FORCED, OFF = "Automatic", "Forced", "Off"


@dataclass
class Question:
    """
    A question and its settings.

    Raises:
        `ValueError`: for a user to read.
    """

    text: str
    retrieval: str  # AUTOMATIC, FORCED or OFF
    top_k: int
    max_new_tokens: int
    min_score: float | None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("Write a question first.")
        if len(self.text) > MAX_QUESTION:
            raise ValueError(f"The question has {len(self.text):,} characters, expected {MAX_QUESTION:,} at most.")
