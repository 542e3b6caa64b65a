"""The nouns of a question: those that the data gives, or those that a rule finds without a tagger."""

import re

# Words that are no nouns, or too common in questions to say what one is about.
STOP_WORDS = frozenset(
    "a about after all also am an and any are as at be became become been before began begin born both but by call "
    "called came can come could did died discovered do does during each ever find first for found founded from gave "
    "get give given go goes got had happen happened has have he held her him his how i if in into invented is it "
    "its join joined last lie lies live lived lives located made make makes many married me most much my name named "
    "no not of off on one or other our out over painted play played plays said same say says sell she so some such "
    "take takes tell than that the their them then there these they this those through to took under until up us "
    "use used was we went were what when where which while who whom whose why will win wins with won would write "
    "written wrote you your".split()
)


def marked_nouns(instance: dict) -> list[str] | None:
    """
    Return the nouns that stand in the data, as `"nouns"` or in `"meta": {"nouns": [...]}`; `None` if none do.

    Raises:
        `ValueError`: if they are no list of texts.
    """
    nouns = instance.get("nouns", (instance.get("meta") or {}).get("nouns"))
    if nouns is None:
        return None
    if not isinstance(nouns, list) or not all(isinstance(noun, str) for noun in nouns):
        raise ValueError(f"Instance {instance['id']!r}: nouns is {nouns!r}, expected a list of texts.")
    return nouns


def nouns_by_rule(question: str) -> list[str]:
    """
    Return the words of a question that are likely its nouns and names.

    They are the words that begin with a capital letter within the question, and all others that are not in
    `STOP_WORDS`, a list of function words and of verbs that many questions have. Rare verbs and adjectives pass too.
    """
    nouns = []
    for place, match in enumerate(re.finditer(r"\w[\w'’-]*", question)):
        word = re.sub(r"['’]s$", "", match[0])
        is_name = place > 0 and word[:1].isupper()
        if is_name or word.lower() not in STOP_WORDS:
            nouns.append(word)
    return list(dict.fromkeys(nouns))
