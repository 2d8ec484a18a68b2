"""Connections by ssh to hosts whose keys are known ahead: with one key of our own, without agent and passwords."""

import base64
import logging

from pkgci.lazy import Lazy

paramiko = Lazy("paramiko")
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

CONNECT_SECONDS = 10
AUTHENTICATION_SECONDS = 60


def public_key(line: str) -> "paramiko.PKey":
    """Return the key of a line `ssh-ed25519 BASE64 [COMMENT]`."""
    return paramiko.Ed25519Key(data=base64.b64decode(line.split()[1]))


def connect(
    host: str, port: int, user: str, identity: "paramiko.PKey", host_key: "paramiko.PKey"
) -> "paramiko.SSHClient":
    """Log in to a host.

    Args:
        host: its name or address.
        port: of its ssh server.
        user: whom to log in as.
        identity: our private key.
        host_key: the only public key that the host may have.

    Returns:
        The connection, to be closed.

    Raises:
        paramiko.BadHostKeyException: it has another host key.
        paramiko.SSHException: (the class of the former too) it does not let us in, or is no ssh server.
        OSError: it cannot be reached.
        EOFError: the connection is lost.
    """
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    # named as in known_hosts, sshd(8)
    client.get_host_keys().add(host if port == 22 else f"[{host}]:{port}", host_key.get_name(), host_key)
    try:
        client.connect(
            host,
            port,
            user,
            pkey=identity,
            timeout=CONNECT_SECONDS,
            banner_timeout=CONNECT_SECONDS,
            auth_timeout=AUTHENTICATION_SECONDS,
            allow_agent=False,
            look_for_keys=False,
        )
    except BaseException:
        client.close()
        raise
    return client
