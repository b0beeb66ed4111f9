"""Registering consumers, contracts and providers in the broker's store, and listing what stands there.

Used by the command line (and by whatever other door there will be). Every function checks first and then writes in one
transaction; what is wrong raises RegistrationError with a sentence that says what to do.
"""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Final

from broker.market.contracts import Contract, contract_bytes, contract_from_bytes
from broker.market.statements import Flow
from broker.market.terms import DeviceTerms
from broker.protocol.codec import is_name
from broker.protocol.envelope import parse
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.messages import Admission, Genesis, Mandate, MessageType
from broker.protocol.sources import Source
from broker.service.pseudonyms import SECRET_BYTES
from broker.service.store import BrokerStore, ConsumerRow, ContractRow, DeviceRow, WorkState

_STATEMENT_TYPES: Final = (
    MessageType.REGISTRATION,
    MessageType.ADMISSION,
    MessageType.MANDATE,
    MessageType.END_OF_MANDATE,
)


class RegistrationError(Exception):
    """A registration that cannot be made. The text says why and what to do."""


def add_consumer(
    store: BrokerStore, genesis: Genesis, meter: str, key: PublicKey, contract: Contract, now_s: int
) -> None:
    """Register a consumer's meter with its first contract; it gets a fresh secret for its pseudonyms.

    Raises RegistrationError if the area is unknown, or meter or key are registered already.
    """
    _check_area(genesis, contract.area)
    if not is_name(meter):
        raise RegistrationError(f"{meter!r} is no name for a meter; use a-z, 0-9 and -, at most 63 of them")
    if store.consumer(meter) is not None:
        raise RegistrationError(
            f"{meter} is registered already; change its contract with `energy-broker consumer contract`"
        )
    if store.device(meter) is not None:
        raise RegistrationError(f"{meter} is registered as a generating device; use another name for this meter")
    _check_key(store, meter, key)
    store.begin()
    store.add_consumer(ConsumerRow(meter, key.cose_key, key.key_id, secrets.token_bytes(SECRET_BYTES), now_s))
    store.add_contract(meter, ContractRow(1, contract.valid_from_s, contract_bytes(contract)))
    store.commit()


def wish_hints(store: BrokerStore, meter: str, *, wished: bool) -> None:
    """Note whether a consumer wants hints of the next day. Raises RegistrationError if the meter is none of ours."""
    if store.consumer(meter) is None:
        raise RegistrationError(f"{meter} is no consumer's meter here; `energy-broker list consumers` names them")
    store.begin()
    store.set_hint_wish(meter, wished=wished)
    store.commit()


def change_contract(store: BrokerStore, genesis: Genesis, meter: str, contract: Contract) -> int:
    """Add a new version of a consumer's contract; the old ones stay on record. Returns its version number.

    Raises RegistrationError if the meter is unknown, or if the new version would begin before the one before it or
    in an interval for which a demand has been accepted: its receipt names the contract that applied.
    """
    _check_area(genesis, contract.area)
    versions = store.contracts(meter)
    if not versions:
        raise RegistrationError(f"no consumer {meter} is registered here; add it with `energy-broker consumer add`")
    if contract.valid_from_s <= versions[-1].valid_from_s:
        raise RegistrationError(
            f"the contract of {meter} in force begins at {versions[-1].valid_from_s}; a new one must begin later"
        )
    if store.has_demand_since(meter, contract.valid_from_s):
        raise RegistrationError(
            f"{meter} has demands after {contract.valid_from_s} that the contract in force applies to;"
            " let the new one begin at a time to come"
        )
    version = versions[-1].version + 1
    store.begin()
    store.add_contract(meter, ContractRow(version, contract.valid_from_s, contract_bytes(contract)))
    store.commit()
    return version


def add_statement(store: BrokerStore, raw: bytes) -> MessageType:
    """Keep a signed statement to be put on the ledger when the broker runs. Returns its type.

    Raises RegistrationError if it is none. Whether its signature holds is for the ledger to say, which knows the keys.
    """
    try:
        envelope = parse(raw)
    except MalformedMessage as error:
        raise RegistrationError(f"this file is no signed statement: {error}") from error
    if envelope.message_type not in _STATEMENT_TYPES:
        raise RegistrationError(f"a {envelope.message_type.name.lower()} is no statement for the ledger")
    store.begin()
    store.add_statement(int(envelope.message_type), raw)
    store.commit()
    return envelope.message_type


def add_provider(
    store: BrokerStore,
    genesis: Genesis,
    broker: str,
    statements: Sequence[bytes],
    terms: DeviceTerms,
) -> list[str]:
    """Take a provider's devices under mandate: registration, admissions and mandates, and the terms for all of them.

    Returns the devices. Raises RegistrationError if statements are missing or do not fit together.
    """
    admissions: dict[str, Admission] = {}
    mandates: dict[str, Mandate] = {}
    for raw in statements:
        try:
            envelope = parse(raw)
            if envelope.message_type is MessageType.ADMISSION:
                admission = Admission.from_payload(envelope.payload)
                admissions[admission.device] = admission
            elif envelope.message_type is MessageType.MANDATE:
                mandate = Mandate.from_payload(envelope.payload)
                mandates[mandate.device] = mandate
            elif envelope.message_type is not MessageType.REGISTRATION:
                raise RegistrationError(f"a {envelope.message_type.name.lower()} does not belong here")
        except ProtocolError as error:
            raise RegistrationError(f"not a signed statement: {error}") from error
    if not mandates:
        raise RegistrationError("no mandate is among the files; make one with `energy-broker provider mandate`")
    rows = []
    for device, mandate in sorted(mandates.items()):
        found = admissions.get(device)
        if found is None:
            raise RegistrationError(f"the admission of {device} is not among the files; ask the registrar for it")
        if mandate.broker != broker:
            raise RegistrationError(f"the mandate of {device} is for {mandate.broker}, this broker is {broker}")
        if mandate.owner != found.owner:
            raise RegistrationError(f"{device} belongs to {found.owner}, but {mandate.owner} gave the mandate")
        _check_area(genesis, found.area)
        if store.device(device) is not None:
            raise RegistrationError(f"{device} is taken on already")
        if store.consumer(device) is not None:
            raise RegistrationError(f"{device} is registered as a consumer's meter; a device needs a meter of its own")
        key = public_key_from_cose(found.meter_key)
        _check_key(store, device, key)
        rows.append(
            DeviceRow(
                device,
                found.owner,
                key.cose_key,
                key.key_id,
                int(found.source),
                found.capacity_w,
                found.area,
                terms.price,
                mandate.from_s,
                terms.reserve_ppm,
                terms.exclusive_ppm,
                terms.exclusive_for,
            )
        )
    store.begin()
    for raw in statements:
        store.add_statement(int(parse(raw).message_type), raw)
    for row in rows:
        store.add_device(row)
    store.commit()
    return [row.device for row in rows]


def _check_area(genesis: Genesis, area: str) -> None:
    if area not in genesis.areas:
        raise RegistrationError(f"area {area} is not one of this ledger's: {', '.join(genesis.areas)}")
    # A broker clears one area; matching demand and generation of different ones is refused by the ledger.
    if area != genesis.areas[0]:
        raise RegistrationError(f"this broker clears area {genesis.areas[0]} only, not {area}")


def _check_key(store: BrokerStore, meter: str, key: PublicKey) -> None:
    """A key tells who signed; with two meters it would tell nothing."""
    consumer, device = store.consumer_by_key(key.key_id), store.device_by_key(key.key_id)
    if consumer is not None or device is not None:
        raise RegistrationError(f"another meter has the key of {meter}; make one with `energy-broker key new`")


TABLES: Final = (
    "consumers",
    "contracts",
    "providers",
    "submissions",
    "demands",
    "readings",
    "history",
    "orders",
    "requests",
    "provided",
    "purchases",
    "sales",
    "batches",
    "conflicts",
)
"""What can be listed and exported."""


def rows_of(store: BrokerStore, table: str) -> Iterator[dict[str, Any]]:
    """The rows of one of TABLES as plain values, in a stable order. Secrets are never among them."""
    return _LISTINGS[table](store)


def _consumers(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.consumers():
        yield {
            "meter": row.meter,
            "key_id": row.key_id.hex(),
            "registered_s": row.registered_s,
            "hints": store.wishes_hints(row.meter),
        }


def _contracts(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for consumer in store.consumers():
        for row in store.contracts(consumer.meter):
            contract = contract_from_bytes(row.contract)
            yield {
                "meter": consumer.meter,
                "version": row.version,
                "valid_from_s": row.valid_from_s,
                "lines_ppm": {line.target.label: line.share_ppm for line in contract.lines},
                "shortage": contract.shortage.label,
                "substitutes": [source.label for source in contract.substitutes],
                "area": contract.area,
                "window": contract.window.label,
                "preferred_providers": list(contract.preferred_providers),
                "excluded_providers": list(contract.excluded_providers),
                "highest_price": contract.highest_price,
                "price_ceilings": {item.source.label: item.highest_price for item in contract.price_ceilings},
                "valid_until_s": contract.valid_until_s,
            }


def _providers(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.devices():
        yield {
            "device": row.device,
            "owner": row.owner,
            "source": Source(row.source).label,
            "capacity_w": row.capacity_w,
            "area": row.area,
            "price": row.price,
            "mandate_from_s": row.from_s,
            "reserve_ppm": row.reserve_ppm,
            "exclusive_ppm": row.exclusive_ppm,
            "exclusive_for": list(row.exclusive_for),
        }


def _submissions(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.statements():
        yield {
            "number": row.number,
            "kind": MessageType(row.kind).name.lower(),
            "state": WorkState(row.state).name.lower(),
            "reason": row.reason,
        }


def _messages(store: BrokerStore, kind: MessageType) -> Iterator[dict[str, Any]]:
    for row in store.all_messages(kind):
        yield {
            "meter": row.meter,
            "start_s": row.start_s,
            "revision": row.revision,
            "energy_wh": row.energy_wh,
            "delivered_wh": row.delivered_wh,
            "message_id": row.message_id.hex(),
            "refusal": row.refusal,
        }


def _demands(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in _messages(store, MessageType.DEMAND):
        yield {**row, "unmatched_wh": row["energy_wh"] - row["delivered_wh"]}


def _readings(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in _messages(store, MessageType.READING):
        yield {key: value for key, value in row.items() if key != "delivered_wh"}


def _history(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.all_deliveries():
        yield {
            "meter": row.meter,
            "start_s": row.start_s,
            "line": row.line,
            "source": Source(row.source).label,
            "device": row.device,
            "from_wh": row.from_wh,
            "to_wh": row.to_wh,
            "energy_wh": row.to_wh - row.from_wh,
            "price": row.price,
            "through": row.through,
        }


def _orders(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.all_orders_out():
        yield {
            "order_id": row.order_id.hex(),
            "neighbour": row.neighbour,
            "start_s": row.start_s,
            "source": Source(row.source).label,
            "energy_wh": row.energy_wh,
            "state": row.state,
            "seen_wh": row.seen_wh,
        }


def _requests(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.all_orders_in():
        yield {
            "order_id": row.order_id.hex(),
            "requester": row.requester,
            "start_s": row.start_s,
            "source": Source(row.source).label,
            "energy_wh": row.energy_wh,
            "state": row.state,
            "granted_wh": row.granted_wh,
        }


def _batches(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for row in store.all_batches():
        yield {
            "number": row.number,
            "batch_id": row.batch_id.hex(),
            "kind": row.kind.name.lower(),
            "start_s": row.start_s,
            "state": row.state.name.lower(),
            "height": row.height,
            "reason": row.reason,
        }


def _transfers(store: BrokerStore, flow: Flow, party: str) -> Iterator[dict[str, Any]]:
    for row in store.transfers(flow):
        yield {
            "device": row.device,
            "start_s": row.asset_start_s,
            "revision": row.asset_revision,
            "source": Source(row.source).label,
            "from_wh": row.from_wh,
            "to_wh": row.to_wh,
            "energy_wh": row.to_wh - row.from_wh,
            party: row.party,
            "price": row.price,
            **({"order_id": row.order_id.hex()} if row.order_id else {}),
        }


def _provided(store: BrokerStore) -> Iterator[dict[str, Any]]:
    return _transfers(store, Flow.PROVIDED, "provider")


def _purchases(store: BrokerStore) -> Iterator[dict[str, Any]]:
    return _transfers(store, Flow.BOUGHT, "neighbour")


def _sales(store: BrokerStore) -> Iterator[dict[str, Any]]:
    return _transfers(store, Flow.SOLD, "neighbour")


def _conflicts(store: BrokerStore) -> Iterator[dict[str, Any]]:
    for meter, kind, start_s, revision, message_id in store.conflicts():
        yield {
            "meter": meter,
            "kind": MessageType(kind).name.lower(),
            "start_s": start_s,
            "revision": revision,
            "message_id": message_id.hex(),
        }


_LISTINGS: Final = {
    "consumers": _consumers,
    "contracts": _contracts,
    "providers": _providers,
    "submissions": _submissions,
    "demands": _demands,
    "readings": _readings,
    "history": _history,
    "orders": _orders,
    "requests": _requests,
    "provided": _provided,
    "purchases": _purchases,
    "sales": _sales,
    "batches": _batches,
    "conflicts": _conflicts,
}
