"""Assets change hands: by their owner, under a mandate, or to a neighbour that ordered them. Pure."""

from broker.ledger.faults import Fault
from broker.ledger.opening import open_statement, party_signer
from broker.ledger.operations import Transfer, Void
from broker.ledger.rules.books import given, holds, put_gain, put_loss, taken, unknown_asset
from broker.ledger.rules.keys import require_serving
from broker.ledger.rules.step import Refused, Step, clock_of, mandates_of, require_broker
from broker.ledger.state import CLOSED, DEVICE, ORDER, PARTY, AssetRow, DeviceRow, Held, OrderRow, PartyRow, asset_key
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Order, Role


def transfer(step: Step, operation: Transfer) -> None:
    """A range of an asset passes from its holder to another party."""
    overlay, asset = step.overlay, operation.asset
    key = asset_key(asset)
    row: AssetRow | None = overlay.get(key)
    if row is None:
        raise unknown_asset(asset)
    # Owners are names on the ledger; a slice given to nobody would be lost.
    receiver: PartyRow | None = overlay.get((PARTY, operation.receiver))
    if receiver is None:
        raise Refused(Fault.UNKNOWN_RECEIVER, f"{operation.receiver} is not registered")
    # It would change nothing and yet stand in the books as trade.
    if operation.receiver == operation.sender:
        raise Refused(Fault.TO_ITSELF, f"{operation.sender} cannot transfer to itself")
    if operation.sender != step.submitter:
        _require_mandate(step, operation)
    left = taken(step, row, asset, operation.sender, operation.from_wh, operation.to_wh)
    if receiver.role == Role.BROKER and operation.receiver != step.submitter:
        _use_order(step, operation, row.source)
    # An order where none is needed would be counted by nobody.
    elif operation.order is not None:
        raise Refused(Fault.ORDER_NOT_NEEDED, "only a transfer to a neighbour broker carries an order")
    held = given(left, Held(operation.from_wh, operation.to_wh, operation.receiver))
    overlay.put(key, row._replace(held=held))
    if not holds(row.held, operation.receiver):
        put_gain(step, operation.receiver, asset, row.source)
    if not holds(held, operation.sender):
        put_loss(step, operation.sender, asset)


def _require_mandate(step: Step, operation: Transfer) -> None:
    asset = operation.asset
    device: DeviceRow | None = step.overlay.get((DEVICE, asset.device))
    # A mandate covers what its giver owns as the device's owner, in the production intervals that it names.
    if (
        device is None
        or device.owner != operation.sender
        or not any(
            span.broker == step.submitter
            and span.from_s <= asset.start_s
            and (span.end_s is None or asset.start_s < span.end_s)
            for span in mandates_of(step.overlay, asset.device)
        )
    ):
        raise Refused(
            Fault.NOT_MANDATED,
            f"{step.submitter} holds no mandate of {operation.sender} for {asset.device} at {asset.start_s}",
        )
    # The owner let this broker take ownership, not give the asset to others behind its back.
    if operation.receiver != step.submitter:
        raise Refused(Fault.MANDATE_TAKES_ONLY, f"under a mandate {step.submitter} transfers to itself only")


def _use_order(step: Step, operation: Transfer, source: int) -> None:
    """Check the receiver's order and count the transfer against it."""
    overlay, receiver, asset = step.overlay, operation.receiver, operation.asset
    # Nobody is made to take, and pay for, what they did not ask for.
    if operation.order is None:
        raise Refused(Fault.ORDER_MISSING, f"a transfer to {receiver} needs its signed order inside")
    try:
        order, opened = open_statement(operation.order, step.charter, lambda key: party_signer(overlay, key), Order)
    # The order must be genuine, and signed for this very ledger: the ledger id is part of what is signed.
    except ProtocolError as error:
        raise Refused(Fault.ORDER_STATEMENT, f"order: {error}") from error
    # Only the receiver itself can ask on its behalf.
    if opened.sender != receiver or order.requester != receiver:
        raise Refused(Fault.ORDER_REQUESTER, f"the order is of {order.requester}, not of {receiver}")
    _require_path(step, order)
    # Source, interval and price are what was asked for.
    if order.source != source:
        raise Refused(Fault.ORDER_SOURCE, f"the order asks for {order.source.label}")
    require_serving(overlay, opened.key_id, order.start_s, clock_of(overlay, receiver))
    if not step.charter.calendar.is_interval(order.start_s, order.end_s) or order.start_s != asset.start_s:
        raise Refused(Fault.ORDER_INTERVAL, f"the order asks for [{order.start_s}, {order.end_s})")
    if operation.price > order.highest_price:
        raise Refused(Fault.ORDER_PRICE, f"price {operation.price} is above the order's {order.highest_price}")
    # After its close the requester has put the rest on record as unmatched and would pay for nothing.
    if overlay.get((CLOSED, receiver, order.start_s)) is not None:
        raise Refused(Fault.ORDER_CLOSED, f"{receiver} has closed the interval at {order.start_s}")
    # The requester's own limit, in its market time.
    if order.not_after_s <= clock_of(overlay, receiver):
        raise Refused(Fault.ORDER_EXPIRED, f"the order was good until {order.not_after_s}")
    key = (ORDER, receiver, order.order_id)
    used: OrderRow = overlay.get(key) or OrderRow(opened.message_id, 0, False)
    # Given up by the requester, who may have asked somebody else for the same Wh since.
    if used.voided:
        raise Refused(Fault.ORDER_VOID, f"{receiver} has given up this order")
    # Else a second order under the same id would double what may be delivered under it.
    if used.content != opened.message_id:
        raise Refused(Fault.ORDER_CONTENT, "another order with this id has been used")
    used_wh = used.used_wh + operation.to_wh - operation.from_wh
    if used_wh > order.energy_wh:
        raise Refused(Fault.ORDER_EXCEEDED, f"{used_wh} Wh exceed the order's {order.energy_wh} Wh")
    overlay.put(key, OrderRow(opened.message_id, used_wh, False))


def _require_path(step: Step, order: Order) -> None:
    """Check the brokers that the order has come through. How many they may be, its form says: two or three."""
    # An order is firm towards one supplier: the last broker of its path.
    if order.path[-1] != step.submitter:
        raise Refused(Fault.ORDER_SUPPLIER, f"the order asks {order.path[-1]}, not {step.submitter}")
    # Passing on is an order of its own: whoever signed it is who the supplier deals with, and stands just before it.
    if order.path[-2] != order.requester:
        raise Refused(
            Fault.ORDER_PATH,
            f"the path ends with {order.path[-2]} asking {step.submitter}, but the order is of {order.requester};"
            " whoever passes an order on signs one of its own",
        )
    # Energy that comes back to who asked for it would count as trade twice and serve nobody.
    if len(set(order.path)) != len(order.path):
        raise Refused(Fault.ORDER_LOOP, f"a broker stands twice in the path {' → '.join(order.path)}; ask another one")
    # A longer path without the order that it stands for, or such an order without its asker, can be led back by nobody.
    if (order.parent is None) != (len(order.path) == 2):
        raise Refused(Fault.ORDER_PARENT, "an order names a parent where its path has three brokers, and only there")
    # Who passes an order on says for whom, and no invented name may stand there. In a path of two this is the requester
    # itself, a broker since it receives. The supplier need be none: a provider may sell what it owns to a broker.
    first: PartyRow | None = step.overlay.get((PARTY, order.path[0]))
    if first is None or first.role != Role.BROKER:
        raise Refused(Fault.ORDER_BROKER, f"{order.path[0]}, first in the order's path, is not registered as a broker")


def void(step: Step, operation: Void) -> None:
    """The submitter gives up an order of its own; the row stays, so that nothing comes under it later."""
    require_broker(step)
    # The row's key holds the submitter's name, so nobody can void an order but its requester.
    key = (ORDER, step.submitter, operation.order_id)
    used: OrderRow = step.overlay.get(key) or OrderRow(None, 0, False)
    step.overlay.put(key, OrderRow(used.content, used.used_wh, True))
