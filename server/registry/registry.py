"""The registry of a server: what it was started with and what clients put there, under its rules.

What was given at the start cannot be changed, what a preset names or a running request uses cannot
be deleted, and nothing is taken that does not fit the served model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from headway.server.http.admin import AdminKeys
from headway.server.http.presets import Preset, load_presets, parse_preset, preset_content
from headway.server.registry.documents import Record
from headway.server.registry.names import DIGEST_PREFIX, Reference, check_name, check_reference
from headway.server.registry.presets import RegistryPresets
from headway.server.registry.store import Store
from headway.server.registry.view import RegistryProfiles, ignore
from headway.steering import ModelGeometry, Reason, SteeringError
from headway.steering.profiles import NamedProfiles


class Registry:
    """Profiles and presets of one server, and who may change them. Methods block on the disk.

    geometry: the model's, with all profiles that requests may name. in_use: whether a running
    request uses the artefact of a digest (hex). on_found, on_deleted: called with the name and the
    number of a version that was found or deleted.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        store: Store,
        keys: AdminKeys,
        preset_options: Iterable[str] = (),
        on_found: Callable[[str, int], None] = ignore,
        on_deleted: Callable[[str, int], None] = ignore,
    ) -> None:
        given = geometry.profiles
        if not isinstance(given, NamedProfiles):
            given = NamedProfiles({})
        self.store = store
        self.keys = keys
        self.profiles = RegistryProfiles(given, store, geometry, on_found=on_found)
        self.geometry = replace(geometry, profiles=self.profiles)
        start = load_presets(preset_options, self.geometry)
        self.presets = RegistryPresets(start, store, self.geometry, self.profiles)
        self.in_use: Callable[[str], bool] = lambda digest: False
        self._on_deleted = on_deleted

    @property
    def is_writable(self) -> bool:
        """Whether clients may change it at all."""
        return bool(self.keys)

    def put_profile(self, name: str, value: Any) -> tuple[Record, bool]:
        """Make the next version of a profile, as `Store.put_profile`; reads it into memory."""
        self.refuse_given_profile(check_name(name, "name"))
        number, is_new = self.store.put_profile(name, value, self.geometry)
        reference = str(Reference(name, number))
        record = self.profiles.record(reference)
        if record is None or self.profiles.load(record) is None:
            message = f"{reference} was deleted while it was put"
            raise SteeringError(Reason.PROFILE_NOT_FOUND, message, "name")
        return record, is_new

    def delete_profile(self, text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Remove a profile (`name`) or one version (`name@version`), and what only it referred to.

        Returns the versions and the artefacts that are gone. Raises SteeringError:
        E_PROFILE_NOT_FOUND, or E_IN_USE, naming what uses it.
        """
        asked = check_reference(text, "name")
        self.refuse_given_profile(asked.name)
        with self.store.lock:
            numbers = self.store.versions(asked.name)
            going = numbers if asked.version is None else (asked.version,)
            if not numbers or not set(going) <= set(numbers):
                message = f"the registry has no profile {text}"
                raise SteeringError(Reason.PROFILE_NOT_FOUND, message, "name")
            self._refuse_used(asked.name, going, numbers)
            artifacts = self.store.delete_profile(asked.name, going)
        for number in going:
            self._on_deleted(asked.name, number)
        return (
            tuple(str(Reference(asked.name, number)) for number in going),
            tuple(f"{DIGEST_PREFIX}{digest}" for digest in artifacts),
        )

    def put_preset(self, name: str, value: Any) -> tuple[Preset, bool]:
        """Create or replace a preset; returns it and whether it is new.

        Raises SteeringError for one that does not compile for the served model.
        """
        self._refuse_given(check_name(name, "name"), self.presets.given, "preset")
        with self.store.lock:
            preset = parse_preset(name, value, self.geometry, "preset")
            is_new = self.store.preset_stamp(name) is None
            self.store.put_preset(name, preset_content(preset))
        return preset, is_new

    def delete_preset(self, name: str) -> None:
        """Remove a preset. Raises SteeringError: E_PRESET_NOT_FOUND, E_IN_USE."""
        self._refuse_given(check_name(name, "name"), self.presets.given, "preset")
        if not self.store.delete_preset(name):
            message = f"the registry has no preset {name}"
            raise SteeringError(Reason.PRESET_NOT_FOUND, message, "name")

    def refuse_given_profile(self, name: str) -> None:
        """Raise SteeringError(E_IN_USE) for a profile that was given at the start."""
        self._refuse_given(name, self.profiles.given.profiles, "profile")

    def _refuse_given(self, name: str, given: Iterable[str], what: str) -> None:
        if name in given:
            message = f"the {what} {name} was given at the start of the server; it stays as it is"
            raise SteeringError(Reason.IN_USE, message, "name")

    def _refuse_used(self, name: str, going: tuple[int, ...], numbers: tuple[int, ...]) -> None:
        """Raise SteeringError(E_IN_USE) if something needs one of the versions that are going."""
        for number in going:
            digest = self.store.digest(name, number)
            if digest is not None and self.in_use(digest):
                message = f"a running request uses {Reference(name, number)}"
                raise SteeringError(Reason.IN_USE, message, "name")
        gone = {str(Reference(name, number)) for number in going}
        if set(going) == set(numbers):
            gone.add(name)
        gone |= {f"{DIGEST_PREFIX}{digest}" for digest in self.store.orphans(name, going)}
        for preset, references in self.presets.references().items():
            for reference in references:
                if reference in gone:
                    message = f"the preset {preset} names {reference}; change the preset first"
                    raise SteeringError(Reason.IN_USE, message, "name")
