"""The door of the broker: which addresses need keys, and which keys may come in."""

import zmq
from zmq.utils import z85

from esper.leyline.errors import ConfigError
from esper.oona.keys import CurveKeys, admitted

DOMAIN = b"oona"
_ADDRESS = "inproc://zeromq.zap.01"


def check_address(listen: str, keys: CurveKeys | None) -> None:
    """Refuse to listen to other machines without keys.

    Raises:
        ConfigError: the address is not of this machine alone and there are no keys, or keys without a folder of
            admitted peers.

    Example:
        >>> check_address("tcp://127.0.0.1:*", None)
        >>> check_address("tcp://0.0.0.0:7000", None)
        Traceback (most recent call last):
        ...
        esper.leyline.errors.ConfigError: tcp://0.0.0.0:7000 can be reached from other machines; ...
    """
    if keys is not None and keys.admitted is None:
        raise ConfigError("The broker's keys name no folder of admitted peers; use keys.admitting(folder).")
    if keys is None and not is_local(listen):
        advice = "give the broker keys, or listen on 'tcp://127.0.0.1:*'"
        raise ConfigError(f"{listen} can be reached from other machines; {advice}.")


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address."""
    transport, _, rest = address.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    return transport in ("ipc", "inproc") or transport == "tcp" and (host in ("localhost", "::1") or _is_loopback(host))


def _is_loopback(host: str) -> bool:
    parts = host.split(".")
    return len(parts) == 4 and parts[0] == "127" and all(part.isdigit() for part in parts)


class Gate:
    """Answers the questions of libzmq about who may connect (ZAP, ZeroMQ RFC 27); lives in the broker's thread.

    The folder of admitted keys is read at every handshake, so a key is admitted without a restart; taking one away
    keeps its owner from connecting again.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", router: "zmq.Socket[bytes]", keys: CurveKeys) -> None:
        """Guard a socket that is not bound yet."""
        assert keys.admitted is not None
        self._folder = keys.admitted
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ADDRESS)
        router.zap_domain = DOMAIN
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        router.curve_secretkey = keys.secret.encode()
        router.curve_publickey = keys.public.encode()
        router.curve_server = 1

    def answer(self) -> str | None:
        """Answer one question; return the public key that was refused, if one was."""
        request = self.socket.recv_multipart()
        version, number, mechanism = request[0], request[1], request[5]
        key = request[6] if len(request) > 6 and mechanism == b"CURVE" else b""
        public = z85.encode(key).decode() if len(key) == 32 else ""
        name = admitted(self._folder).get(public)
        status, text = (b"200", b"OK") if name is not None else (b"400", b"unknown key")
        self.socket.send_multipart([version, number, status, text, (name or "").encode(), b""])
        return None if name is not None else public or "no key"
