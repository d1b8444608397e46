"""Which vLLM plugins a process loads.

vLLM symbols relied on: the environment variable `VLLM_PLUGINS` and the groups of entry points in
`vllm.plugins`. Unset, the variable lets every plugin load except those that add HTTP routes; set,
it is an allow-list for all of them. Headway adds routes, so it must be named there.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib.metadata import EntryPoint, entry_points

NAME = "headway"
VARIABLE = "VLLM_PLUGINS"
GENERAL_GROUP = "vllm.general_plugins"
ENDPOINT_GROUP = "vllm.endpoint_plugins"
OWN_GROUPS = (GENERAL_GROUP, ENDPOINT_GROUP)
DEFAULT_GROUPS = (
    GENERAL_GROUP,
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""Groups whose plugins load unless an allow-list says otherwise."""


class PluginError(RuntimeError):
    """Headway's own plugins would not load, so requests would be served unsteered."""


def allow_headway(environment: MutableMapping[str, str]) -> list[str]:
    """Name Headway in VLLM_PLUGINS (changed in place), keeping what loads without it.

    Call it before vLLM is imported. Returns the names of installed plugins that the list now
    shuts out: those that would come with HTTP routes of their own nobody asked for.
    """
    if VARIABLE in environment:
        names = [name for name in environment[VARIABLE].split(",") if name]
        if NAME not in names:
            environment[VARIABLE] = ",".join([*names, NAME])
        return []
    default = {plugin.name for group in DEFAULT_GROUPS for plugin in entry_points(group=group)}
    routes = {plugin.name for plugin in entry_points(group=ENDPOINT_GROUP)}
    environment[VARIABLE] = ",".join(sorted((default - routes) | {NAME}))
    return sorted((default & routes) - {NAME})


def own_plugins() -> list[EntryPoint]:
    """Headway's entry points, loaded once to see that they can be.

    vLLM only logs a plugin that fails to load and serves on without it. Raises PluginError.
    """
    found = []
    for group in OWN_GROUPS:
        plugins = list(entry_points(group=group, name=NAME))
        if not plugins:
            raise PluginError(f"no plugin {NAME} in {group}: is the package headway installed?")
        for plugin in plugins:
            try:
                plugin.load()
            except Exception as error:
                message = f"the plugin {plugin.value} of {group} does not load: {error!r}"
                raise PluginError(message) from error
        found.extend(plugins)
    return found
