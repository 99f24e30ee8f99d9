"""Teaches Hydra that ``recipe=task/sst2`` means the file ``recipes/task/sst2.yaml``.

Hydra has no alias from a group's name to a folder, and ``glob(task/*)`` needs nested names to be
listed. A config source with its own scheme does both with Hydra's public base classes alone.
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from cfm_train import paths
from cfm_train.config import catalogue

GROUP = "recipe"


class RecipeSource(ConfigSource):
    """Serves the group ``recipe`` from the folder ``recipes``."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        path = self._file(config_path)
        if path is None or not path.is_file():
            raise ConfigLoadError(f"Config not found: {config_path}")
        with open(path, encoding="utf-8") as file:  # a file, so that YAML errors carry its name
            config = OmegaConf.load(file)
        if not isinstance(config, DictConfig):
            raise ConfigLoadError(f"{path}: a recipe is a mapping of keys, not a list")
        # A recipe composes a whole run, so its keys stand at the root unless it says otherwise.
        header = self._get_header_dict(path.read_text("utf-8"))
        header["package"] = header["package"] or "_global_"
        return ConfigResult(
            config=config, path=self.full_path(), provider=self.provider, header=header
        )

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        inside = self._inside(config_path)
        return config_path == "" or (inside is not None and (Path(self.path) / inside).is_dir())

    def is_config(self, config_path: str) -> bool:
        path = self._file(config_path)
        return path is not None and path.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Nested names, without the recipes that only run when a person gives them data."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        if config_path != GROUP or results_filter == ObjectType.GROUP:
            return []
        return [e.name for e in catalogue.recipes(Path(self.path).parent).values() if not e.needs]

    def _inside(self, config_path: str) -> str | None:
        if config_path == GROUP:
            return ""
        return config_path.removeprefix(f"{GROUP}/") if config_path.startswith(GROUP) else None

    def _file(self, config_path: str) -> Path | None:
        inside = self._inside(config_path)
        if not inside:
            return None
        return Path(self.path) / self._normalize_file_name(inside)


class RecipeSearchPath(SearchPathPlugin):
    """Puts the folder ``recipes`` on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("cfm_train", f"recipes://{paths.ROOT / 'recipes'}")


def register() -> None:
    """Makes both known to Hydra; calling it again changes nothing."""
    plugins = Plugins.instance()
    for plugin in (RecipeSource, RecipeSearchPath):
        if plugin not in plugins.discover(plugin):
            plugins.register(plugin)
