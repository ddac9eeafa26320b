"""Which of several operators writes: the one that holds a Lease. The others watch, and are ready to go on.

The protocol is that of Kubernetes' own controllers, by the client library's election; here it only gets a rhythm that can
be stopped. `handlers` opens the reconciler's queue when the lease is ours and ends the process when it is lost.
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
# As client-go has them: whoever cannot renew has stopped five seconds before anybody else may begin.
DURATION_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
_CALL_SECONDS = 5
_CALLS = ("read_namespaced_lease", "create_namespaced_lease", "replace_namespaced_lease")


class LeaseLostError(LatentflowError):
    """The lease could not be renewed; somebody else may write now."""


class Lease:
    """One candidate for a Lease.

    Args:
        place: Namespace and name of the Lease.
    """

    def __init__(self, api: kube.ApiClient, place: tuple[str, str]) -> None:
        namespace, name = place
        # One line for each renewal, every two seconds.
        logging.getLogger("leaderelection").setLevel(logging.WARNING)
        calls = kube.CoordinationV1Api(api)
        self._lock = LeaseLock(name, namespace, f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}")
        for call in _CALLS:
            setattr(calls, call, partial(getattr(calls, call), _request_timeout=_CALL_SECONDS))
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
        # A call goes on in its thread when whoever awaits it is cancelled.
        self._calling = threading.Lock()
        self._released = False

    async def acquire(self) -> None:
        """Returns when the lease is ours."""
        waiting = False
        while not await self._try():
            if not waiting:
                waiting = True
                _log.info("another operator works; watching until it stops", lease=self._name)
            await asyncio.sleep(RETRY_SECONDS)
        _log.info("this operator works", lease=self._name, identity=self._lock.identity)

    async def hold(self) -> None:
        """Renews the lease, until it was not possible for ten seconds: LeaseLostError."""
        while self._renewed is not None and time.monotonic() - self._renewed < RENEW_SECONDS:
            await asyncio.sleep(RETRY_SECONDS)
            await self._try()
        self._renewed = None
        raise LeaseLostError(
            f"The Lease {self._name} could not be renewed for {RENEW_SECONDS} s; another operator may work now. "
            "This one ends, to begin anew."
        )

    async def release(self) -> None:
        """Lets another begin at once, where the lease is ours."""
        if self._renewed is None:
            return
        self._renewed = None
        try:
            await asyncio.to_thread(self._give_back)
        except urllib3.exceptions.HTTPError as error:
            _log.warning("the lease could not be given back; it runs out by itself", error=str(error))

    def _give_back(self) -> None:
        lock, now = self._lock, str(datetime.now())
        with self._calling:
            self._released = True
            # An update replaces what was read last, so it is read first.
            found, record = lock.get(lock.name, lock.namespace)
            if found and record.holder_identity == lock.identity:
                lock.update(lock.name, lock.namespace, LeaderElectionRecord(None, "1", now, now))

    def _renew(self) -> bool:
        with self._calling:
            return not self._released and bool(self._election.try_acquire_or_renew())

    @property
    def _name(self) -> str:
        return f"{self._lock.namespace}/{self._lock.name}"

    async def _try(self) -> bool:
        before = time.monotonic()
        try:
            ours = await asyncio.to_thread(self._renew)
        except urllib3.exceptions.HTTPError as error:
            _log.warning("the API server was not reached", lease=self._name, error=str(error))
            return False
        if ours:
            self._renewed = before
        return ours
