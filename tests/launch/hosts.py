"""Two hosts on this machine: network namespaces with names of their own, and the link between."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PROGRAMS = ("ip", "unshare")
CARD = "veth0"  # on either host
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def why_none() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"no {' and '.join(missing)}: apt-get install iproute2 util-linux"
    name = f"l2e-{secrets.token_hex(3)}"
    done = run("ip", "netns", "add", name, check=False)
    if done.returncode:
        return f"no right to make network namespaces ({done.stderr.strip()})"
    run("ip", "netns", "del", name)
    return None


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": PATH}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)


@dataclass(frozen=True)
class Hosts:
    """The two, and what separates them."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    def within(self, number: int) -> list[str]:
        """What stands before a command that is to run on one of them."""
        name = self.names[number]
        # The names are those of processes, so that nothing else of this machine is called so.
        shell = 'hostname "$0" && exec "$@"'
        return ["unshare", "--uts", "ip", "netns", "exec", name, "sh", "-c", shell, name]

    def link(self, up: bool) -> None:
        """Connect or separate them."""
        run("ip", "-n", self.names[0], "link", "set", CARD, "up" if up else "down")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two network namespaces and a pair of virtual cards; gone afterwards."""
    token = secrets.token_hex(3)
    hosts = Hosts((f"l2e-{token}-a", f"l2e-{token}-b"))
    try:
        for name in hosts.names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        one, other = hosts.names
        pair = ("type", "veth", "peer", "name", CARD, "netns", other)
        run("ip", "-n", one, "link", "add", "name", CARD, *pair)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", CARD)
            run("ip", "-n", name, "link", "set", CARD, "up")
        yield hosts
    finally:
        for name in hosts.names:
            run("ip", "netns", "del", name, check=False)
