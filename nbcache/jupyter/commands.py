"""``nbcache kernelspec``: the kernelspec's commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nbcache.output import AsJson, print_result

app = typer.Typer(help="The kernel whose restarts skip the imports, for Jupyter.", no_args_is_help=True)


@app.command("install")
def install(
    name: Annotated[str, typer.Option(help="What the kernelspec is called.")] = "nbcache",
    display_name: Annotated[str, typer.Option(help="What people see; by default Python 3 (nbcache).")] = "",
    user: Annotated[bool, typer.Option("--user", help="For your servers of any environment; the default.")] = False,
    sys_prefix: Annotated[bool, typer.Option("--sys-prefix", help="For servers of this environment alone.")] = False,
    prefix: Annotated[str, typer.Option(help="For servers of the environment with this prefix.")] = "",
    as_json: AsJson = False,
) -> None:
    """Install the kernel of this interpreter, for the user's Jupyter servers of whichever environment."""
    from nbcache.jupyter import kernelspec

    folder = kernelspec.install(name, display_name, _prefix(user, sys_prefix, prefix))
    print_result({"name": name, "folder": folder} if as_json else f"installed {name} in {folder}")


@app.command("remove")
def remove(
    name: Annotated[str, typer.Option(help="What the kernelspec is called.")] = "nbcache",
    user: Annotated[bool, typer.Option("--user", help="The user's own; the default where there is one.")] = False,
    sys_prefix: Annotated[bool, typer.Option("--sys-prefix", help="That of this environment.")] = False,
    prefix: Annotated[str, typer.Option(help="That of the environment with this prefix.")] = "",
    as_json: AsJson = False,
) -> None:
    """Remove the kernel, and end the processes that wait to become one."""
    from nbcache.jupyter import kernelspec

    folder, other = kernelspec.remove(name, _prefix(user, sys_prefix, prefix), user)
    said = f"removed {name} from {folder}" + (f"; there is another in {other}" if other else "")
    print_result({"name": name, "folder": folder, "other": other} if as_json else said)


def _prefix(user: bool, sys_prefix: bool, prefix: str) -> str | None:
    """The environment that was named; None for the user's own folder."""
    if user + sys_prefix + bool(prefix) > 1:
        raise typer.BadParameter("one of --user, --sys-prefix and --prefix")
    return prefix or (sys.prefix if sys_prefix else None)
