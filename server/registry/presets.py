"""The presets of a server: those given at its start, and the registry's."""

from __future__ import annotations

import logging
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any

from headway.server.http.presets import Preset, parse_preset, preset_content
from headway.server.registry.store import Stamp, Store
from headway.server.registry.view import RegistryProfiles
from headway.steering import ModelGeometry, SteeringError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Compiled:
    """A preset; None where it does not compile for this model.

    stamp: of its file in the registry, None for one that was given at the start. references: the
    profiles that it names; versions: those that this meant, just before it was compiled.
    """

    stamp: Stamp | None
    references: tuple[str, ...]
    versions: tuple[str | None, ...]
    preset: Preset | None


class RegistryPresets(Mapping[str, Preset]):
    """Presets by name: those given at the start, in their order, then the registry's, sorted.

    A name given at the start stands for that preset alone. Presets of the registry that do not
    compile for this model, being another server's, are left out. What another server put or
    deleted is seen at once; a preset is compiled again when it, or a profile it names, changed.

    geometry: with `profiles` in it.
    """

    def __init__(
        self,
        given: Mapping[str, Preset],
        store: Store,
        geometry: ModelGeometry,
        profiles: RegistryProfiles,
    ) -> None:
        self.given = given
        self._store = store
        self._geometry = geometry
        self._profiles = profiles
        self._compiled: dict[str, _Compiled] = {}

    def __getitem__(self, name: str) -> Preset:
        preset = self._given(name) or self._stored(name)
        if preset is None:
            raise KeyError(name)
        return preset

    def __iter__(self) -> Iterator[str]:
        yield from self.given
        for name in self._store.preset_names():
            if name not in self.given and self._stored(name) is not None:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> ItemsView[str, Preset]:
        """Those that are there now. What is deleted meanwhile, by whomever, is left out."""
        now = ((name, self.get(name)) for name in self)
        return {name: preset for name, preset in now if preset is not None}.items()

    def values(self) -> ValuesView[Preset]:
        """As `items`."""
        return dict(self.items()).values()

    def references(self) -> dict[str, tuple[str, ...]]:
        """Preset -> the profiles that it names; of all presets, also those of other models."""
        found = {name: profiles_in(preset.methods) for name, preset in self.given.items()}
        for name in self._store.preset_names():
            if name not in self.given:
                self._stored(name)
                known = self._compiled.get(name)
                found[name] = known.references if known else ()
        return found

    def _given(self, name: str) -> Preset | None:
        """That of the start, as the profiles that it names are now.

        Where it does not compile any more it stays as it was: a request that names it is refused.
        """
        preset = self.given.get(name)
        if preset is None:
            return None
        return self._current(name, None, lambda: preset_content(preset)) or preset

    def _stored(self, name: str) -> Preset | None:
        stamp = self._store.preset_stamp(name)
        if stamp is None:
            self._compiled.pop(name, None)
            return None
        return self._current(name, stamp, lambda: self._store.preset(name))

    def _current(self, name: str, stamp: Stamp | None, read: Callable[[], Any]) -> Preset | None:
        known = self._compiled.get(name)
        if known is None or known.stamp != stamp or known.versions != self._exact(known.references):
            known = self._compile(name, stamp, read)
            self._compiled[name] = known
        return known.preset

    def _compile(self, name: str, stamp: Stamp | None, read: Callable[[], Any]) -> _Compiled:
        preset: Preset | None = None
        references: tuple[str, ...] = ()
        versions: tuple[str | None, ...] = ()
        try:
            value = read()
            references = profiles_in(value.get("methods") if isinstance(value, dict) else None)
            # Before it is compiled: what changes meanwhile must not pass for what was compiled.
            versions = self._exact(references)
            preset = parse_preset(name, value, self._geometry, name)
        except SteeringError as error:
            logger.warning("a preset is not for this server: %s", error)
        except Exception:  # one preset must not take all others down
            logger.exception("the preset %s failed to compile", name)
        return _Compiled(stamp, references, versions, preset)

    def _exact(self, references: tuple[str, ...]) -> tuple[str | None, ...]:
        return tuple(map(self._profiles.exact, references))


def profiles_in(methods: Any) -> tuple[str, ...]:
    """The profiles that the methods of a preset name."""
    named = (each.get("profile") for each in methods or () if isinstance(each, dict))
    return tuple(profile for profile in named if isinstance(profile, str))
