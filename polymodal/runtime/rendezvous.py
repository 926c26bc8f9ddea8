"""Where the processes of a run meet: the store of the process group, and how the launchers of several nodes
find one another.

On one node nothing listens: the processes' store is a file in the launcher's own directory (0700). Between
nodes a store listens on the address that MASTER_ADDR names, and on no other where that address is this
machine's. torch's store knows no password, so nothing that is read from it may run code: torch's own elastic
rendezvous keeps a pickle there, which is JSON here, signed with POLYMODAL_SECRET (the same on every node).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import astuple
from datetime import datetime, timedelta
from typing import Any

from polymodal.core.errors import PolymodalError

STORE_FILE = "POLYMODAL_STORE_FILE"
"""Set in processes of a run on one node: the file of their store, to which the attempt's number is added."""

SECRET = "POLYMODAL_SECRET"


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _literal(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _reachable(name: str, address: str) -> bool:
    """Whether other nodes can mean this machine by a loopback address: only where it was written as such.

    Many systems give their own host name a loopback address (127.0.1.1), and operators of Kubernetes call the
    first pod localhost in that pod alone.
    """
    written = _literal(name) or (name == "localhost" and "KUBERNETES_SERVICE_HOST" not in os.environ)
    return written or not _loopback(address)


def listening(name: str, port: int) -> socket.socket:
    """A socket that listens on the address of a name, or on all where that is not an address of this machine
    (a Kubernetes service, an address behind NAT). Raises OSError for a port in use."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    for family, _, _, _, where in found:
        if not _reachable(name, str(where[0])):
            continue
        try:
            return socket.create_server(where, family=family, backlog=4096)
        except OSError as error:
            if "in use" in str(error):
                raise
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)


def tcp_store(name: str, port: int, world: int | None, timeout: timedelta, serves: bool) -> Any:
    """torch's store at an address; serves: it is kept by this process."""
    import torch.distributed as dist

    if not serves:
        return dist.TCPStore(name, port, world, False, timeout)
    server = listening(name, port)
    # connections of this process go to the address that was chosen
    own, port = server.getsockname()[:2]
    own = name if own in ("::", "0.0.0.0") else own
    options: dict[str, Any] = {"multi_tenant": True, "master_listen_fd": server.detach()}
    return dist.TCPStore(own, port, world, True, timeout, **options)


def own_address(name: str, port: int) -> str | None:
    """This machine's address on the network that leads to a name, for other nodes; None where only the host's
    name can tell."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    return address if _reachable(name, address) else None


def joined_store(rank: int, world: int, address: str, port: int, timeout: timedelta) -> Any:
    """The store of the process group, as the launcher of this process left it in the environment."""
    import torch.distributed as dist

    if file := os.environ.get(STORE_FILE):
        store = dist.FileStore(f"{file}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", world)
        store.set_timeout(timeout)
        return store
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return tcp_store(address, port, world, timeout, serves=True)
    return next(iter(dist.rendezvous("env://", rank, world, timeout=timeout)))[0]


def fixed(run_id: str, rank: int, nodes: int, address: str, port: int, store: Callable[[], Any]) -> Any:
    """A rendezvous of nodes whose ranks are given. store: makes the one that all of them use."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class Fixed(RendezvousHandler):
        use_agent_store = nodes > 1
        made: Any = None

        def get_backend(self) -> str:
            return "fixed"

        def next_rendezvous(self) -> RendezvousInfo:
            self.made = store() if self.made is None else self.made
            where = RendezvousStoreInfo(address, port)
            return RendezvousInfo(dist.PrefixStore(run_id, self.made), rank, nodes, where)

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            pass

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return run_id

        def shutdown(self) -> bool:
            return True

    return Fixed()


def elastic(parameters: Any, address: str, port: int, serves: bool) -> Any:
    """torch's rendezvous of nodes that may leave and come back, with its state as signed JSON in the store.

    Raises RendezvousConnectionError while the first node's store is not there.
    """
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, dynamic_rendezvous
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

    class Backend(C10dRendezvousBackend):
        """torch's handler gives and takes pickles: they are made and read on this side of the store alone."""

        def get_state(self) -> Any:
            found = super().get_state()
            return found and (_unsealed(found[0]), found[1])

        def set_state(self, state: bytes, token: Any = None) -> Any:
            found = super().set_state(_sealed(state), token)
            return found and (_unsealed(found[0]), *found[1:])

    seconds = timedelta(seconds=parameters.get_as_int("read_timeout", 60))
    try:
        store = tcp_store(address, port, None, seconds, serves)
    except (ValueError, RuntimeError, TimeoutError, OSError) as error:
        raise RendezvousConnectionError(str(error)) from error
    return dynamic_rendezvous.create_handler(store, Backend(store, parameters.run_id), parameters)


def _signature(text: bytes) -> str:
    return hmac.new(os.environ.get(SECRET, "").encode(), text, hashlib.sha256).hexdigest()


def _sealed(state: bytes) -> bytes:
    """The state of torch's rendezvous, which this process pickled, as JSON behind its signature."""
    facts = dict(vars(pickle.loads(state)))
    deadline = facts["deadline"]
    facts["deadline"] = deadline and deadline.isoformat()
    facts["participants"] = sorted([*astuple(n), rank] for n, rank in facts["participants"].items())
    beats = facts["last_heartbeats"].items()
    facts["last_heartbeats"] = sorted([*astuple(n), time.isoformat()] for n, time in beats)
    for name in ("wait_list", "redundancy_list"):
        facts[name] = sorted(map(astuple, facts[name]))
    text = json.dumps(facts).encode()
    return _signature(text).encode() + text


def _refused(message: str, hint: str) -> PolymodalError:
    from torch.distributed.elastic.rendezvous import RendezvousStateError

    class Refused(PolymodalError, RendezvousStateError):
        """torch's thread for heartbeats takes it for one of its own errors."""

    return Refused(message, hint)


def _unsealed(sealed: bytes) -> bytes:
    """A state of `_sealed` as torch's handler takes it. Raises PolymodalError for anything else."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    signature, text = sealed[:64], sealed[64:]
    if not hmac.compare_digest(signature, _signature(text).encode()):
        raise _refused(
            "What the nodes of this run keep in their store was written by somebody who does not know its "
            f"{SECRET}.",
            f"Set {SECRET} to the same text on every node, and keep others off MASTER_PORT.",
        )
    try:
        facts, node = json.loads(text), dynamic_rendezvous._NodeDesc
        state = dynamic_rendezvous._RendezvousState()
        when = datetime.fromisoformat
        state.round, state.complete = int(facts["round"]), bool(facts["complete"])
        state.closed = bool(facts["closed"])
        state.deadline = when(facts["deadline"]) if facts["deadline"] else None
        state.participants = {node(*n): int(rank) for *n, rank in facts["participants"]}
        state.last_heartbeats = {node(*n): when(time) for *n, time in facts["last_heartbeats"]}
        state.wait_list = {node(*n) for n in facts["wait_list"]}
        state.redundancy_list = {node(*n) for n in facts["redundancy_list"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(
            f"What the nodes of this run keep in their store cannot be read ({type(error).__name__}).",
            "Use one version of polymodal and torch on every node, and keep others off MASTER_PORT.",
        ) from None
    return pickle.dumps(state)
