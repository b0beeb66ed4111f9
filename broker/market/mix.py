"""The mix decision: for which contract line the next Wh are, given what was delivered before. Integers only.

With shares p_l (ppm), h_l Wh delivered for line l and H Wh delivered altogether since the contract version and the
accounting period began, a demand of d Wh is divided by the weights

    w_l = max(0, p_l * (H + d) - 1 000 000 * h_l)

which say how far each line will be behind its share (in millionths of a Wh) once the demand is delivered. Each line
gets floor(d * w_l / W), W being the sum of the weights, and each of the few Wh still missing goes to the line that is
then furthest behind, the earlier one in the contract if two are level. So every Wh has a line, and what a line was
short of before is caught up. docs/market.md has worked tables.

The missing Wh do not go to the largest remainder of d * w_l / W, which looks simpler: every small line that was ahead
by a rounded-up Wh takes its Wh from the large line, those debts add up, and with eleven lines some stand 4 Wh off their
share within a day. Going to whoever is behind, no line was ever found 1.5 Wh off while supply is ample.

W is at least 1 000 000 * d, because the shares add up to 1 000 000 and the h_l to at most H. So the weights are all
zero only when d is zero, and then there is nothing to divide; and a line with no weight never gets a missing Wh,
because some other one is still behind.
"""

from collections.abc import Sequence

from broker.market.contracts import WHOLE_PPM, History


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Divide `total` whole units by `weights`: the floor of total * w / W each, the rest to the largest remainders.

    Ties go by position. The shares always add up to `total`; a weight of zero gets nothing; and while `total` is at
    most W, nobody gets more than their weight. Raises ValueError for a positive total over weights that are all zero.
    """
    if total == 0:
        return [0] * len(weights)
    weight_sum = sum(weights)
    if total < 0 or weight_sum <= 0:
        raise ValueError(f"cannot divide {total} by weights that add up to {weight_sum}")
    shares = []
    remainders = []
    for weight in weights:
        share, remainder = divmod(total * weight, weight_sum)
        shares.append(share)
        remainders.append(remainder)
    missing = total - sum(shares)
    if missing:
        # Sorting is stable, so equal remainders stay in the order of their positions.
        by_remainder = sorted(range(len(remainders)), key=remainders.__getitem__, reverse=True)
        for position in by_remainder[:missing]:
            shares[position] += 1
    return shares


def quotas(lines_ppm: Sequence[int], history: History, demand_wh: int) -> tuple[int, ...]:
    """How many Wh of a demand each contract line is to deliver; they add up to `demand_wh`.

    `lines_ppm` are the shares in contract order and add up to 1 000 000. Raises ValueError if `history` has another
    number of lines.
    """
    if demand_wh == 0:
        return (0,) * len(lines_ppm)
    due_wh = history.total + demand_wh
    behind = [
        max(0, share_ppm * due_wh - WHOLE_PPM * delivered_wh)
        for share_ppm, delivered_wh in zip(lines_ppm, history.by_line, strict=True)
    ]
    weight_sum = sum(behind)
    shares_wh = [demand_wh * weight // weight_sum for weight in behind]
    missing_wh = demand_wh - sum(shares_wh)
    if missing_wh:
        for line, share_wh in enumerate(shares_wh):
            behind[line] -= WHOLE_PPM * share_wh
        for _ in range(missing_wh):
            line = behind.index(max(behind))
            shares_wh[line] += 1
            behind[line] -= WHOLE_PPM
    return tuple(shares_wh)


def plain_shares(lines_ppm: Sequence[int], demand_wh: int) -> tuple[int, ...]:
    """Each line's share of this demand alone, rounded down: what a line gets at least when another one runs short."""
    return tuple([share_ppm * demand_wh // WHOLE_PPM for share_ppm in lines_ppm])
