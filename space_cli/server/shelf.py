"""The models of a server: public names, and which are in memory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from space_cli.api import Model
from space_cli.models.inventory import inventory
from space_cli.server.errors import ApiError

log = logging.getLogger("space.serve")


class Shelf:
    """Models by name; loads them on request and evicts the least recently used.

    Args:
        given: names as they were given to the server, the first of which is the default.
        load: gives the model of a name.
        most: models in memory at once.
        models_file: a user's own models.toml.
    """

    def __init__(
        self, given: Sequence[str], load: Callable[[str], Model], *, most: int = 1, models_file: Path | None = None
    ) -> None:
        # a folder or file is listed by its last part only, so its path stays private
        self._sources = {Path(name).name if Path(name).exists() else name: name for name in given}
        self.default = next(iter(self._sources))
        self._load, self._most, self._models_file = load, max(most, 1), models_file
        self._loaded: OrderedDict[str, Model] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """The names that can be requested: the server's models, and those of models.toml that are on this machine."""
        here = [status.name for status in inventory(self._models_file) if status.present]
        return list(dict.fromkeys([*self._sources, *here]))

    @property
    def loaded(self) -> list[Model]:
        """The models in memory."""
        return list(self._loaded.values())

    def name_of(self, asked: str | None) -> str:
        """Return the name under which a request is served.

        Raises:
            ApiError: there is no such model.
        """
        if not asked:
            return self.default
        if asked in self._loaded or asked in self.names:
            return asked
        message = f"the model {asked!r} does not exist here; GET /v1/models lists those that do"
        raise ApiError(404, message, code="model_not_found", param="model")

    def preload(self) -> None:
        """Load as many of the given models as may be in memory, with the error of the first that cannot be."""
        for name, source in list(self._sources.items())[: self._most]:
            self._loaded[name] = self._load(source)

    def has_room(self, name: str, in_use: Collection[str]) -> bool:
        """Return whether a model is in memory or can be loaded without evicting one in use."""
        return name in self._loaded or len(in_use) < self._most

    def get(self, name: str, in_use: Collection[str] = ()) -> Model:
        """Return a model, loading it (and evicting an idle one) if necessary; only called if there is room.

        Raises:
            ApiError: it cannot be loaded.
        """
        if name not in self._loaded:
            try:
                self._make_room(in_use)
                self._loaded[name] = self._load(self._sources.get(name, name))
            except Exception as error:
                log.error("%s could not be loaded: %s", name, error)
                raise ApiError(
                    503, f"the model {name!r} could not be loaded; the server's log says why", code="model_not_loaded"
                ) from error
            log.info("%s is loaded", name)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _make_room(self, in_use: Collection[str]) -> None:
        idle = [name for name in self._loaded if name not in in_use]
        while len(self._loaded) >= self._most:
            log.info("%s is given up", idle[0])
            del self._loaded[idle.pop(0)]
