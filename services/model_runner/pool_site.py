"""What the parts of the pool share on one node: its store, its keys, its peers, and what is to be held of an entry."""

from __future__ import annotations

import logging

import numpy as np

from edge.bus import Bus
from edge.config import PoolConfig
from edge.group_keys import GroupKeys
from edge.pool_files import PoolFiles
from edge.pool_store import Held, PoolStore
from edge.service import Context
from protocol.codec import Received
from protocol.errors import MindstreamError, SnapshotRefused, TrustError
from protocol.identity import Keyring
from protocol.messages import PoolWitness
from protocol.pool import SignedPoolEntry, Witness, entry_id, read_witness, read_witnesses, set_aside, witness
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import Engine
from services.model_runner.memory import MIB
from services.model_runner.pool_rates import PoolRates

log = logging.getLogger(__name__)

CLOSE_TOLERANCE = 0.2
"""Of readings under other numerics: so far may keys and values of any position in any layer be apart, and states,
relative to their size (``pool_blocks.difference``). Measured on SmolLM2-135M, the worst position of 512: 0.08 between
two chunk schedules in bfloat16, 0.16 between bfloat16 and float32 (docs/pool.md)."""
SAY_S = 5.0
MOST_VERDICTS = 16_384


class Site:
    """On any thread. ``engine`` is set once the model is loaded."""

    engine: Engine

    def __init__(self, context: Context, bus: Bus, files: PoolFiles, keys: GroupKeys, costs: CostBook) -> None:
        self.config: PoolConfig = context.config.pool
        self.context = context
        self.identity = context.identity
        self.node = context.identity.node
        self.bus = bus
        self.keys = keys
        self.rates = PoolRates(costs)
        self.store = PoolStore(files, self.config.most_mib * MIB, self.dropped)
        self.store.set_aside_by(self.against)
        self._verdicts: dict[str, tuple[object, int, bool]] = {}

    def keyring(self) -> Keyring:
        """Whom this node trusts. Raises StorageError."""
        return self.context.peers.keyring()

    # --- what is held of an entry ---------------------------------------------------------------------------

    def witnesses(self, signed: SignedPoolEntry) -> list[Witness]:
        """What trusted nodes say of an entry: what came with it, and what was heard."""
        identifier = entry_id(signed)
        said = read_witnesses([*signed.witnesses, *self.store.statements(identifier)], self.keyring())
        return [each for each in said if each.entry == identifier]

    def against(self, held: Held) -> bool:
        """Whether an entry here is set aside."""
        said = self.store.statements(held.identifier)
        if not said:
            return False
        keyring = self.keyring()
        known = self._verdicts.get(held.identifier)
        stamp = hash(tuple(each.signature for each in said))
        if known is None or known[0] is not keyring or known[1] != stamp:
            known = keyring, stamp, set_aside(held.creator, read_witnesses(said, keyring))
            if len(self._verdicts) > MOST_VERDICTS:
                self._verdicts.clear()
            self._verdicts[held.identifier] = known
        return known[2]

    def hear_witness(self, message: Received) -> None:
        """What another node says of an entry."""
        said: PoolWitness = message.data
        if message.node == self.node:
            return
        try:
            found = read_witness(said.statement, self.keyring())
        except (TrustError, SnapshotRefused) as error:
            self.count("refused.pool_witness")
            log.info("%s said of a pool entry what does not count: %s", message.node, error)
            return
        self._take_statement(found, said)

    def _take_statement(self, found: Witness, said: PoolWitness) -> None:
        if not self.store.keep_statement(found.entry, found.node, said.statement, instead=not found.agrees):
            return
        self.count("pool.witnessed" if found.agrees else "pool.disagreed")
        if not found.agrees:
            self._say_set_aside(found)

    def _say_set_aside(self, found: Witness) -> None:
        apart = f"{found.error:.3g} apart" if np.isfinite(found.error) else "other content"
        self.report(
            "pool-set-aside",
            "error",
            f"pool entry {found.entry[:12]} is set aside: {found.node} has read the same prefix itself and found "
            f"otherwise ({found.how}, {apart})",
        )

    def bear_witness(self, identifier: str, agrees: bool, how: str, error: float) -> None:
        """Say of an entry, to all and for good, what comparing it with what was read here has shown."""
        tolerance = CLOSE_TOLERANCE if how == "close" else 0.0
        said = PoolWitness(witness(self.identity, identifier, agrees, how, error, tolerance))
        self._take_statement(Witness(self.node, identifier, agrees, how, error), said)
        try:
            self.bus.say(said, timeout_s=SAY_S)
        except MindstreamError as failed:
            self.count("dropped.pool_witness")
            log.warning("what this node says of pool entry %s could not be said: %s", identifier[:12], failed)

    # --- counting -------------------------------------------------------------------------------------------

    def count(self, counter: str) -> None:
        """One more."""
        self.bus.counters.add(counter)

    def report(self, name: str, severity: str, text: str) -> None:
        """Say an event."""
        self.bus.events.report(name, severity, text)

    def dropped(self, counter: str, text: str) -> None:
        """Of the store: an entry could not be used, or made room."""
        self.count(counter)
        if text:
            self.report(counter.replace(".", "-"), "warning", text)

    def refused(self, error: MindstreamError) -> None:
        """An entry that another node gave, or that was found, cannot be used."""
        self.count("refused.pool_entry")
        self.report("refused-pool-entry", "warning", str(error))
