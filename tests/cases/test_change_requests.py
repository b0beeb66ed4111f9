"""Case 4: energy that a broker does not own comes by three change requests, whatever happens to any of them.

    first    east orders wind of west, over MQTT
    second   west has the ledger transfer it to east, with east's order inside, and answers *done*
    third    east has the ledger deliver it to its consumer

Each test lets one step be refused, get lost, come twice or come late, and then looks at what everybody has on record.
What the ledger refuses of a delivery cannot be provoked from outside of an honest broker: `tests/simulation` does that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from broker.ledger.operations import Deliver, Transfer
from broker.protocol.envelope import parse
from broker.protocol.messages import AnswerStatus, Order, OrderAnswer, ResultStatus
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from cases.marketplace import HALF_HOUR_S, LEDGER, Broker, MarketPlace, Meter, content

pytestmark = pytest.mark.integration

TOPICS = Topics()
FIRST = TOPICS.request("west")
DONE = TOPICS.response("east", "west")
SUBMIT = TOPICS.ledger_submit(LEDGER)
RESULT_FOR_EAST = TOPICS.ledger_result(LEDGER, "east")
RESULT_FOR_WEST = TOPICS.ledger_result(LEDGER, "west")


@dataclass
class Trade:
    """Anna at east wants 400 Wh of wind of this half hour; east has none, west has 900 Wh of the mill."""

    market: MarketPlace
    east: Broker
    west: Broker
    anna: Meter
    mill: Meter

    def begins(self, wind_wh: int = 900) -> None:
        """The half hour is over, and both meters have reported."""
        self.market.next_half_hour()
        self.mill.reports(wind_wh)
        self.anna.reports(400)
        self.market.settle()

    def gate_1_passes_while_west_loses(self, topic: str, *, times: int) -> None:
        """So often, west's connection loses what is said there."""
        self.west.line.lose(topic, times=times)
        self.market.gate_1_passes()
        self.market.wait_until(lambda: self.west.line.lost != [], f"a message on {topic} to get lost")

    def gate_2_passes_and_east_closes(self) -> None:
        """Whatever else hangs, east settles the half hour."""
        self.market.gate_2_passes()
        self.market.wait_until(lambda: self.market.has_closed(self.east), "east to close")

    def orders(self) -> list[bytes]:
        """The first change request of this half hour, each time that it was said."""
        said = [message.payload for message in self.market.heard(FIRST)]
        by_east = [raw for raw in said if parse(raw).key_id == self.market.public_key("east").key_id]
        return [raw for raw in by_east if content(raw).start_s == self.market.half_hour_s]

    def order(self) -> bytes:
        """The first change request of this half hour."""
        return self.orders()[0]

    def answers(self) -> list[bytes]:
        """What west answered to it, each time."""
        said = [message.payload for message in self.market.heard(DONE)]
        order_id = content(self.order()).order_id
        return [raw for raw in said if content(raw).order_id == order_id]

    def answer(self) -> AnswerStatus:
        """What west answered to it; every time the same."""
        (raw,) = set(self.answers())
        status: AnswerStatus = content(raw).status
        return status

    def is_done(self, *, sold_wh: int = 400) -> None:
        """All three change requests stand on the ledger, once, in this order; everybody agrees about it."""
        (second,) = [row for row in self.market.operations_now("transfer") if row["order"]]
        deliveries = [row for row in self.market.operations_now("deliver") if row["slices"]]
        (third,) = deliveries
        assert (second["sender"], second["receiver"]) == ("west", "east")
        assert second["to_wh"] - second["from_wh"] == sold_wh
        assert bytes.fromhex(second["order"]) == self.order()
        assert second["height"] < third["height"]
        assert self.anna.got() == {"wind": sold_wh}
        assert {row["through"] for row in self.anna.history()} == {"west"}
        assert self.anna.unmatched_wh() == 400 - sold_wh
        assert [(row["neighbour"], row["energy_wh"]) for row in self.east.rows_now("purchases")] == [("west", sold_wh)]
        assert [(row["neighbour"], row["energy_wh"]) for row in self.west.rows_now("sales")] == [("east", sold_wh)]
        assert [row["state"] for row in self.east.rows_now("orders")] == ["seen"]
        assert [row["state"] for row in self.west.rows_now("requests")] == ["committed"]
        self.market.check_books()

    def is_called_off(self) -> None:
        """Nothing changed hands: the consumer is unmatched, and west still has its wind."""
        assert [row for row in self.market.operations_now("transfer") if row["order"]] == []
        assert self.anna.got() == {}
        assert self.anna.unmatched_wh() == 400
        assert self.east.rows_now("purchases") == self.west.rows_now("sales") == []
        self.market.check_books()


@pytest.fixture(scope="module")
def street(market: MarketPlace, east: Broker, west: Broker) -> tuple[Meter, Meter]:
    # Two meters that never report: gate 1 comes when it is time, and not as soon as everybody has reported.
    east.takes_on_device("silent-1", "solar")
    west.takes_on_device("silent-2", "solar")
    return east.takes_on_consumer("anna", {"wind": 100}), west.takes_on_device("mill", "wind")


@pytest.fixture
def trade(market: MarketPlace, east: Broker, west: Broker, street: tuple[Meter, Meter]) -> Iterator[Trade]:
    for broker in (east, west):
        broker.line.lost.clear()
    yield Trade(market, east, west, *street)
    # Whatever a test broke, it is whole again for the next one.
    market.ledger_goes_on()
    for broker in (east, west):
        broker.line.lose_nothing()
        if not broker.process.running:
            broker.comes_back()


def test_4_three_change_requests_bring_a_neighbours_wind_to_the_consumer(trade: Trade) -> None:
    trade.begins()
    trade.market.gate_1()
    trade.market.gate_2()

    trade.is_done()
    assert trade.answer() is AnswerStatus.DONE
    assert trade.market.holder_of("mill") == {"west": 500}


# The first change request


def test_4_first_refused_the_neighbour_has_none(trade: Trade) -> None:
    trade.begins(wind_wh=0)
    trade.market.gate_1()
    trade.market.gate_2()

    trade.is_called_off()
    assert trade.answer() is AnswerStatus.REFUSED
    assert [row["state"] for row in trade.east.rows_now("orders")] == ["refused"]


def test_4_first_granted_in_part(trade: Trade) -> None:
    trade.begins(wind_wh=250)
    trade.market.gate_1()
    trade.market.gate_2()

    trade.is_done(sold_wh=250)
    assert trade.market.holder_of("mill") == {}


def test_4_first_lost_it_is_said_again(trade: Trade) -> None:
    trade.begins()
    trade.west.line.lose(FIRST, times=1)
    trade.market.gate_1()
    trade.market.gate_2()

    assert [message.payload for message in trade.west.line.lost] == [trade.order()]
    trade.is_done()


def test_4_first_repeated_it_is_answered_again_and_served_once(trade: Trade) -> None:
    trade.begins()
    trade.market.gate_1()
    (answer,) = trade.answers()
    again = trade.market.said_until(lambda: trade.market.publish(FIRST, trade.order()), DONE)
    trade.market.gate_2()

    assert again.payload == answer
    trade.is_done()


def test_4_first_late_after_the_half_hour_is_closed_the_ledger_refuses_to_serve_it(trade: Trade) -> None:
    """West was cut off, east gave up and closed. The order that arrives now is worth nothing any more."""
    trade.begins()
    trade.gate_1_passes_while_west_loses(FIRST, times=1_000)
    trade.gate_2_passes_and_east_closes()
    assert trade.anna.unmatched_wh() == 400

    trade.west.line.lose_nothing()
    trade.market.publish(FIRST, trade.order())
    trade.market.wait_until(lambda: trade.answers() != [], "west's answer")
    trade.market.settle()

    assert trade.answer() is AnswerStatus.REFUSED
    trade.is_called_off()
    assert trade.market.holder_of("mill") == {"west": 900}


# The second change request


def test_4_second_lost_on_its_way_to_the_ledger_it_is_submitted_again(trade: Trade) -> None:
    """Its sender is killed, and never knew whether it had arrived. It submits the stored bytes anew."""
    trade.begins()
    trade.gate_1_passes_while_west_loses(SUBMIT, times=1)
    trade.west.loses_power()
    trade.west.comes_back()
    trade.market.gate_2()

    trade.is_done()


def test_4_second_repeated_it_counts_once(trade: Trade) -> None:
    trade.begins()
    trade.market.gate_1()
    (second,) = [raw for raw in trade.market.batches_now(Transfer) if trade.order() in raw]
    again = trade.market.said_until(lambda: trade.market.publish(SUBMIT, second), RESULT_FOR_WEST)
    trade.market.gate_2()

    assert content(again.payload).status is ResultStatus.COMMITTED

    trade.is_done()


def test_4_second_late_the_ledger_stands_still_for_a_while(trade: Trade) -> None:
    trade.begins()
    trade.market.ledger_stands_still()
    trade.market.gate_1_passes()
    trade.market.wait_until(lambda: trade.orders() != [], "the first change request")
    assert trade.anna.got() == {}
    trade.market.ledger_goes_on()
    trade.market.gate_2()

    trade.is_done()


def test_4_second_refused_its_order_was_voided_before(trade: Trade) -> None:
    """West takes the order, and the ledger its transfer only after east's gate 2: too late, so west keeps the wind."""
    trade.begins()
    trade.gate_1_passes_while_west_loses(SUBMIT, times=1_000)
    trade.gate_2_passes_and_east_closes()

    trade.west.line.lose_nothing()
    trade.west.loses_power()
    trade.west.comes_back()
    trade.market.settle()

    assert [row["state"] for row in trade.west.rows_now("requests")] == ["dead"]
    assert trade.answer() is AnswerStatus.REFUSED
    trade.is_called_off()
    assert trade.market.holder_of("mill") == {"west": 900}


# Done


def test_4_done_lost_the_ledger_is_believed_without_it(trade: Trade) -> None:
    trade.begins()
    trade.east.line.lose(DONE, times=1_000)
    trade.market.gate_1()
    trade.market.gate_2()

    assert trade.east.line.lost != []
    trade.is_done()


def test_4_done_late_and_repeated_changes_nothing(trade: Trade) -> None:
    trade.begins()
    trade.east.line.lose(DONE, times=1_000)
    trade.market.gate_1()
    trade.market.gate_2()
    trade.east.line.lose_nothing()
    for _ in range(3):
        trade.market.publish(DONE, trade.east.line.lost[-1].payload)
    trade.market.settle()

    trade.is_done()


def test_4_done_that_is_not_true_moves_nothing(trade: Trade) -> None:
    """West's key says *done*, and nothing stands on the ledger."""
    trade.begins()
    trade.gate_1_passes_while_west_loses(FIRST, times=1_000)
    lie = OrderAnswer(content(trade.order()).order_id, AnswerStatus.DONE, 400, b"\1" * 32)
    trade.market.publish(DONE, trade.market.sealed_by("west", lie))
    trade.gate_2_passes_and_east_closes()
    trade.west.line.lose_nothing()
    trade.market.settle()

    assert [row["state"] for row in trade.east.rows_now("orders")] == ["void"]
    trade.is_called_off()
    assert trade.market.holder_of("mill") == {"west": 900}


def test_4_an_order_in_anothers_name_is_not_served(trade: Trade) -> None:
    """Signed by nobody whom west knows as east."""
    trade.begins()
    start_s = trade.market.half_hour_s
    end_s = start_s + HALF_HOUR_S
    forged = Order(b"f" * 16, "east", Source.WIND, start_s, end_s, 100, 1_000_000, end_s, ("east", "west"))
    trade.market.new_key("mallory")
    trade.market.publish(FIRST, trade.market.sealed_by("mallory", forged))
    trade.market.gate_1()
    trade.market.gate_2()

    assert [row["order_id"] for row in trade.west.rows_now("requests")] == [content(trade.order()).order_id.hex()]
    trade.is_done()


# The third change request


def test_4_third_lost_or_late_its_sender_is_killed_before_it_hears_of_the_second(trade: Trade) -> None:
    """East finds the transfer on the ledger when it is back, and delivers."""
    trade.begins()
    trade.market.ledger_stands_still()
    trade.market.gate_1_passes()
    trade.market.wait_until(lambda: trade.orders() != [], "the first change request")
    trade.east.loses_power()
    trade.market.ledger_goes_on()
    trade.market.wait_until(lambda: trade.market.holder_of("mill").get("east") == 400, "the transfer to east")
    trade.east.comes_back()
    trade.market.gate_2()

    trade.is_done()


def test_4_third_repeated_the_same_batch_is_submitted_twice(trade: Trade) -> None:
    trade.begins()
    trade.market.gate_1()
    (third,) = trade.market.batches_now(Deliver)
    again = trade.market.said_until(lambda: trade.market.publish(SUBMIT, third), RESULT_FOR_EAST)
    trade.market.gate_2()

    assert content(again.payload).status is ResultStatus.COMMITTED
    trade.is_done()
