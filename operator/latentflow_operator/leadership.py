"""Leader election: of several operators only the holder of a Lease writes. The others watch and are ready to take over.

The protocol is that of Kubernetes' own controllers, from the client library; this module runs it in a loop that can be
stopped. `handlers` opens the reconciler's work queue when the Lease is acquired, and ends the process when it is lost.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
import uuid
from datetime import datetime
from functools import partial

import structlog
import urllib3
from kubernetes import client as kube
from kubernetes.leaderelection.electionconfig import Config
from kubernetes.leaderelection.leaderelection import LeaderElection
from kubernetes.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.leaderelection.resourcelock.leaselock import LeaseLock
from latentflow.errors import LatentflowError

_log = structlog.get_logger()
# The values of client-go: a holder that cannot renew stops five seconds before another candidate may acquire the Lease.
DURATION_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
_TIMEOUT_SECONDS = 5
_CALLS = ("read_namespaced_lease", "create_namespaced_lease", "replace_namespaced_lease")


class LeaseLostError(LatentflowError):
    """The Lease could not be renewed; another operator may write now."""


class Lease:
    """One candidate for a Lease.

    Args:
        key: Namespace and name of the Lease.
    """

    def __init__(self, api: kube.ApiClient, key: tuple[str, str]) -> None:
        namespace, name = key
        # It logs a line for each renewal, that is every two seconds.
        logging.getLogger("leaderelection").setLevel(logging.WARNING)
        calls = kube.CoordinationV1Api(api)
        self._lock = LeaseLock(name, namespace, f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}")
        for call in _CALLS:
            setattr(calls, call, partial(getattr(calls, call), _request_timeout=_TIMEOUT_SECONDS))
        self._lock.api_instance = calls
        self._election = LeaderElection(
            Config(
                self._lock,
                lease_duration=DURATION_SECONDS,
                renew_deadline=RENEW_SECONDS,
                retry_period=RETRY_SECONDS,
                onstarted_leading=lambda: None,
                onstopped_leading=lambda: None,
            )
        )
        self._renewed: float | None = None
        # A call continues in its thread after the task that awaits it has been cancelled.
        self._calling = threading.Lock()
        self._released = False

    async def acquire(self) -> None:
        """Waits until this candidate holds the Lease."""
        waiting = False
        while not await self._try_renew():
            if not waiting:
                waiting = True
                _log.info("another operator holds the lease; watching until it ends", lease=self._name)
            await asyncio.sleep(RETRY_SECONDS)
        _log.info("this operator holds the lease", lease=self._name, identity=self._lock.identity)

    async def hold(self) -> None:
        """Renews the Lease. Raises LeaseLostError once it could not be renewed for ten seconds."""
        while self._renewed is not None and time.monotonic() - self._renewed < RENEW_SECONDS:
            await asyncio.sleep(RETRY_SECONDS)
            await self._try_renew()
        self._renewed = None
        raise LeaseLostError(
            f"The Lease {self._name} could not be renewed for {RENEW_SECONDS} s; another operator may hold it now. "
            "This one ends, so that it is restarted as a candidate."
        )

    async def release(self) -> None:
        """Releases the Lease, if this candidate holds it, so that another one can acquire it at once."""
        if self._renewed is None:
            return
        self._renewed = None
        try:
            await asyncio.to_thread(self._release)
        except urllib3.exceptions.HTTPError as error:
            _log.warning("could not release the lease; it expires by itself", error=str(error))

    def _release(self) -> None:
        lock, now = self._lock, str(datetime.now())
        with self._calling:
            self._released = True
            # The client library's update replaces the record that it read last, so the record is read first.
            found, record = lock.get(lock.name, lock.namespace)
            if found and record.holder_identity == lock.identity:
                lock.update(lock.name, lock.namespace, LeaderElectionRecord(None, "1", now, now))

    def _renew(self) -> bool:
        with self._calling:
            return not self._released and bool(self._election.try_acquire_or_renew())

    @property
    def _name(self) -> str:
        return f"{self._lock.namespace}/{self._lock.name}"

    async def _try_renew(self) -> bool:
        before = time.monotonic()
        try:
            held = await asyncio.to_thread(self._renew)
        except urllib3.exceptions.HTTPError as error:
            _log.warning("could not reach the API server", lease=self._name, error=str(error))
            return False
        if held:
            self._renewed = before
        return held
