"""The commands of a `bash` block, one after another, as far as pages use the shell."""

import re
import shlex
from dataclasses import dataclass

HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
VARIABLE = re.compile(r"\$\{?(\w+)\}?")
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
SEPARATORS = {"&&", "||", ";", "|", "&"}
REDIRECTIONS = {">", ">>", "<", "2>", "&>", ">&"}
LOOP_WORDS = {"do", "done", "for", "then", "if", "fi"}


@dataclass
class Command:
    """
    A command of a block.

    Args:
        line (`int`): number of its line in the block, from 0.
        words (`list[str]`): the program and its arguments. A variable that the block sets has its (first) value.
        text (`str`): what it reads from `<<WORD`.
    """

    line: int
    words: list[str]
    text: str = ""


def commands_of(code: str) -> list[Command]:
    """
    Return the commands of a block; it may have comments, quotes, loops, and texts after `<<WORD`.

    Raises:
        `ValueError`: for a quote or text that does not end.
    """
    lines = code.splitlines()
    commands = []
    variables: dict[str, str] = {}
    number = 0
    while number < len(lines):
        start = number
        text = lines[number]
        number += 1
        while _goes_on(text):
            if number == len(lines):
                raise ValueError(f"line {start + 1} of the block does not end")
            text = f"{text.rstrip()[:-1]} {lines[number]}" if text.endswith("\\") else f"{text}\n{lines[number]}"
            number += 1
        heredoc = HEREDOC.search(text)
        body = ""
        if heredoc:
            end = lines.index(heredoc[2], number)
            body = "\n".join(lines[number:end])
            text = text.replace(heredoc[0], "")
            number = end + 1
        for words in _split(text, variables):
            commands.append(Command(start, words, body))
    return commands


def _goes_on(text: str) -> bool:
    """Return whether a command continues on the next line."""
    if text.endswith("\\"):
        return True
    try:
        shlex.split(text, comments=True)
    except ValueError:  # within quotes
        return True
    return False


def _split(text: str, variables: dict[str, str]) -> list[list[str]]:
    """Return the words of each command of a line, and note what the line sets."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    is_file = False  # the next word is a file that is read or written
    for word in lexer:
        if word in SEPARATORS:
            commands.append([])
        elif is_file:
            is_file = False
        elif word in REDIRECTIONS:
            is_file = True
            if commands[-1] and commands[-1][-1] == "2":
                commands[-1].pop()
        else:
            commands[-1].append(word)
    return [words for words in (_program(words, variables) for words in commands) if words]


def _program(words: list[str], variables: dict[str, str]) -> list[str]:
    """Return a command with the values of variables, and without what precedes its program."""
    words = [VARIABLE.sub(lambda match: variables.get(match[1], match[0]), word) for word in words]
    while words:
        assignment = ASSIGNMENT.fullmatch(words[0])
        if words[0] == "for":
            variables[words[1]] = words[3]
            return []
        if assignment:
            variables[assignment[1]] = assignment[2]
        elif words[0] not in LOOP_WORDS:
            break
        words = words[1:]
    return words
