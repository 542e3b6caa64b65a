"""Single files of a folder or of a repository on the Hub, such as the settings of a model that CoSup is built from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.utils import cached_file

from .files_cosup import read_json
from .hub_cosup import HUB_OPTIONS


@dataclass
class SourceFiles:
    """
    The files of one model.

    Args:
        name (`str`): folder, or repository on the Hub.
        options (`dict`): `revision`, `token` and other [`~hub_cosup.HUB_OPTIONS`] of a download.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def find(self, file: str) -> Path | None:
        """
        Return the local path of a file, downloaded if necessary; `None` if there is no such file.

        Raises:
            `OSError`: for a repository that does not exist or cannot be reached.
        """
        options = {name: value for name, value in self.options.items() if name in HUB_OPTIONS}  # of code, none
        path = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **options)
        return None if path is None else Path(path)

    def read(self, file: str) -> Any:
        """
        Return the content of a JSON file, `None` if there is no such file.

        Raises:
            `ValueError`: if it is not valid JSON.
        """
        path = self.find(file)
        if path is None:
            return None
        try:
            return read_json(path)
        except ValueError as error:
            raise ValueError(f"{self.name}: {file} is not valid JSON: {error}") from error

    def known_to_lack(self, file: str) -> bool:
        """Return whether a file that was not found is known not to exist; without the Hub, the cache may not know."""
        if Path(self.name).is_dir():
            return True
        options = {name: self.options[name] for name in ("revision", "cache_dir") if name in self.options}
        in_cache = try_to_load_from_cache(self.name, file, **options)
        return in_cache is not None and not isinstance(in_cache, str)  # the cache's mark of a missing file
